"""``adapterhub hub …``: the embedded Hub."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.errors import HubError


@click.group("hub")
def hub_command() -> None:
    """Run a Hub of your own: what huggingface_hub, `hf` and transformers speak to with HF_ENDPOINT."""


@hub_command.command("serve")
@click.argument("root", type=click.Path(file_okay=False, path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8081, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option("--user", help="A user who may write to their own namespace; needs --token.")
@click.option(
    "--token",
    envvar="ADAPTERHUB_HUB_TOKEN",
    show_envvar=True,
    help="That user's token. Others on this machine can see command lines: the variable hides it.",
)
def serve_command(root: Path, host: str, port: int, user: str | None, token: str | None) -> None:
    """Serve the repositories in the folder ROOT (made if missing) until Ctrl-C or SIGTERM.

    Its first line on stdout is `listening on http://HOST:PORT`, printed when it accepts connections; point
    HF_ENDPOINT there.

    With --user and --token, or with tokens kept in ROOT (`adapterhub hub token add`), everybody may read
    public repositories, and only the owner's tokens may write, or see private ones. Without any token the Hub
    is open: everybody who reaches it is the user "local" and may write everywhere; so it then listens on
    loopback only.

    Uploads go through git-lfs: clients with hf_xet installed need HF_HUB_DISABLE_XET=1.
    """
    if (user is None) != (token is None):
        raise click.UsageError("--user and --token belong together.")
    if token is not None and (
        not token.strip() or not token.isascii() or not token.isprintable() or " " in token
    ):
        raise click.UsageError("--token must be printable ASCII without blanks.")
    try:
        from adapterhub.hub.server.serve import serve
    except ModuleNotFoundError as err:
        if (err.name or "").partition(".")[0] not in ("dulwich", "starlette", "uvicorn"):
            raise
        raise HubError(
            f"the embedded Hub needs {err.name}, which is not installed", "pip install 'adapterhub[serve]'"
        ) from err

    def announce(address: str) -> None:
        click.echo(f"listening on {address}")
        if user is None and token is None:
            click.echo("no --token given: see `adapterhub hub serve --help` for who may write", err=True)

    serve(root, host, port, user, token, announce=announce)
