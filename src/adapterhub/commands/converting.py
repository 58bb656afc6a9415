"""convert."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("convert")
@click.argument("pickle", metavar="ADAPTER.bin", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The PEFT folder to make.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert_command(pickle: Path, out: Path, as_json: bool) -> None:
    """Turn the pickle of a PEFT adapter into safetensors, in a new folder with its configuration.

    A pickle can run code when it is opened. This one is read first, and refused if it would; then a process
    of its own, with limits, takes the tensors out and builds nothing else.
    """
    from adapterhub.packaging.conversion import convert_pickle

    made = convert_pickle(pickle, out)
    if as_json:
        facts = {"out": str(made.out), "tensors": made.tensors, "bytes": made.size, "sha256": made.sha256}
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{made.tensors} tensors in {made.out}: {made.size} bytes, sha256 {made.sha256}")
    click.echo(f"nothing says who made it: `adapterhub scan {made.out}` looks at what it is", err=True)
