"""export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import click

from adapterhub.commands.bars import bytes_bar
from adapterhub.commands.targets import find_folder, locate_base
from adapterhub.errors import RecipeError

if TYPE_CHECKING:
    from adapterhub.packaging.export.container import Form
    from adapterhub.packaging.export.model import Export


@click.command("export")
@click.argument("source", metavar="RELEASE|REF|FOLDER")
@click.option("--to", "target", required=True, type=click.Choice(["gguf"]), help="llama.cpp's own format.")
@click.option(
    "--type",
    "form",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="What matrices are stored as. Default: f16 for a model, f32 for an adapter, which takes f16 too.",
)
@click.option(
    "--base", metavar="DIR|REF", help="An adapter's base. Default: the one the release names, from the Hub."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The file to make. Default: NAME-VERSION-TYPE.gguf here."
)
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export_command(
    source: str,
    target: str,
    form: Form | None,
    base: str | None,
    out: Path | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Write a release as one GGUF file, which llama.cpp runs.

    An adapter release (or a plain PEFT folder, with --base) becomes a GGUF LoRA, for any GGUF of its base:
    llama-cli --lora FILE. A merged release or another 16-bit checkpoint folder becomes a whole model, with
    tokenizer and chat template. LLaMA, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3 are known; what llama.cpp
    would compute otherwise is refused. Needs the extra gguf.
    """
    from adapterhub.packaging.adapter import CONFIG_NAME
    from adapterhub.packaging.export.adapter import export_adapter
    from adapterhub.packaging.export.model import export_model

    folder = find_folder(source, endpoint)
    is_adapter = (folder / CONFIG_NAME).is_file()
    if is_adapter and form not in (None, "f32", "f16"):
        raise RecipeError(f"an adapter is not stored as {form}", "say --type f32 or f16, or leave it out")
    if not is_adapter and base is not None:
        raise RecipeError(f"{source} is a whole model", "leave --base out")
    chosen: Form = form or ("f32" if is_adapter else "f16")
    place = out or Path(_name(folder, "lora" if is_adapter else chosen))
    with bytes_bar("exporting") as progress:
        if is_adapter:
            base_folder = locate_base(base, folder, endpoint)
            made = export_adapter(folder, base_folder, place, cast(Literal["f32", "f16"], chosen), progress)
        else:
            made = export_model(folder, place, chosen, progress)
    click.echo(json.dumps(_as_dict(made), indent=2) if as_json else _as_text(made))


def _name(folder: Path, end: str) -> str:
    from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest

    if not (folder / MANIFEST_NAME).is_file():
        return f"{folder.resolve().name}-{end}.gguf"
    manifest = Manifest.read(folder)
    return f"{manifest.name}-{manifest.version}-{end}.gguf"


def _as_dict(made: Export) -> dict[str, object]:
    return {
        "out": str(made.out),
        "kind": made.kind,
        "architecture": made.architecture,
        "type": made.form,
        "tensors": made.tensors,
        "bytes": made.size,
        "context": made.context,
        "sliding_window": made.slides,
        "release": made.release
        and {
            "name": made.release.manifest.name,
            "version": made.release.manifest.version,
            "digest": made.release.digest,
        },
    }


def _as_text(made: Export) -> str:
    what = "a GGUF LoRA" if made.kind == "adapter" else "a GGUF model"
    run = f"--lora {made.out}, with a GGUF of its base as -m" if made.kind == "adapter" else f"-m {made.out}"
    window = (
        ", its sliding window: llama.cpp has none here, and would look back further" if made.slides else ""
    )
    return "\n".join(
        f"{label:<12} {text}"
        for label, text in (
            ("file", f"{made.out}: {what}, {made.size:,} bytes"),
            ("model", f"{made.architecture}, {made.tensors} tensors in {made.form}"),
            ("context", f"{made.context} tokens{window}"),
            ("run it", f"llama-cli {run}"),
        )
    )
