"""``adapterhub hub …``: the embedded Hub and its tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.errors import HubError

if TYPE_CHECKING:
    from adapterhub.hub.server.accounts import TokenRecord

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_ROOT = click.argument("root", type=click.Path(file_okay=False, path_type=Path))


@click.group("hub")
def hub_command() -> None:
    """Run a Hub of your own: what huggingface_hub, `hf` and transformers speak to with HF_ENDPOINT."""


@hub_command.command("serve")
@_ROOT
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
    """
    if (user is None) != (token is None):
        raise click.UsageError("--user and --token belong together.")
    if token is not None and not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise click.UsageError("--token must be printable ASCII without blanks.")
    with serve_extra():
        from adapterhub.hub.server.serve import serve

    def announce(address: str, open_to_all: bool) -> None:
        click.echo(f"listening on {address}")
        if open_to_all:
            click.echo("no tokens: everybody on this machine may read and write everything here", err=True)
        elif host not in ("127.0.0.1", "localhost", "::1"):
            click.echo("plain HTTP: put a TLS proxy in front, or tokens travel readable to others", err=True)

    serve(root, host, port, user, token, announce=announce)


@hub_command.group("token")
def token_group() -> None:
    """Add, list and revoke the tokens that a Hub's folder keeps (their digests only)."""


@token_group.command("add")
@_ROOT
@click.option("--user", required=True, help="Whose token it is.")
@click.option(
    "--role",
    type=click.Choice(["read", "write"]),
    default="write",
    show_default=True,
    help="What the token may do.",
)
@click.option(
    "--org", "orgs", multiple=True, help="A further namespace of theirs, such as a team's; may be repeated."
)
@_JSON
def add_token_command(root: Path, user: str, role: str, orgs: tuple[str, ...], as_json: bool) -> None:
    """Make a token for the Hub in the folder ROOT and print it: it is shown only this once."""
    with serve_extra():
        from adapterhub.hub.server.accounts import add_token
    token, record = add_token(root, user, role, orgs)
    click.echo(json.dumps({"token": token, **_token_json(record)}, indent=2) if as_json else token)
    click.echo(f"token {record.id} of {user}, role {role}; a running Hub accepts it at once", err=True)


@token_group.command("list")
@_ROOT
@_JSON
def list_tokens_command(root: Path, as_json: bool) -> None:
    """List the tokens kept in the folder ROOT: id, user, role, organisations, when made."""
    with serve_extra():
        from adapterhub.hub.server.accounts import read_tokens
    records = read_tokens(root)
    if not records:
        click.echo(f"{root} keeps no tokens", err=True)
    if as_json:
        click.echo(json.dumps([_token_json(it) for it in records], indent=2))
        return
    for it in records:
        click.echo("  ".join([it.id, it.user, it.role, ",".join(it.orgs) or "-", it.created]))


@token_group.command("revoke")
@_ROOT
@click.argument("token_id")
@_JSON
def revoke_token_command(root: Path, token_id: str, as_json: bool) -> None:
    """Revoke the token with TOKEN_ID (see `list`); a Hub that is running refuses it from now on."""
    with serve_extra():
        from adapterhub.hub.server.accounts import revoke_token
    record = revoke_token(root, token_id)
    click.echo(f"revoked {record.id} of {record.user}", err=True)
    if as_json:
        click.echo(json.dumps(_token_json(record), indent=2))


def _token_json(record: TokenRecord) -> dict[str, object]:
    return {
        "id": record.id,
        "user": record.user,
        "role": record.role,
        "orgs": record.orgs,
        "created": record.created,
    }


@contextlib.contextmanager
def serve_extra(what: str = "the embedded Hub needs", otherwise: str = "") -> Iterator[None]:
    """Say which extra is missing when what the ``serve`` extra brings is not installed."""
    try:
        yield
    except ModuleNotFoundError as err:
        missing = (err.name or "").partition(".")[0]
        if missing not in ("dulwich", "starlette", "uvicorn"):
            raise
        raise HubError(
            f"{what} {missing}, which is not installed", f"pip install 'adapterhub[serve]'{otherwise}"
        ) from err
