"""retarget."""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.commands.moves import TOOLS, Move, Outcome, describe_move, plan_move, refit_move
from adapterhub.commands.targets import open_checked
from adapterhub.packaging.quantized import words_of

if TYPE_CHECKING:
    from adapterhub.packaging.manifest import Manifest
    from adapterhub.packaging.retarget import RetargetEvidence

RIDES = 0.05
"""Nats a token of KL up to which an adapter is said to ride a base: what a merge warns above, too."""
_TRAINING = ("evidence/ledger.json", "evidence/curve.json")


@click.command("retarget")
@click.argument("release", metavar="RELEASE|REF")
@click.option("--base", required=True, metavar="DIR|REF", help="The version of the base to go to.")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["bf16", "nf4", "fp4", "int8"]),
    help="How that base is loaded. Default: as in training; a base stored in 4 bits says so itself.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Rows like train.jsonl, or plain text, to fit and measure on.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first so many rows or windows.")
@click.option(
    "--trained-on",
    metavar="DIR|REF",
    help="The base trained on. Default: --base if it is that, else the Hub's.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--endpoint", metavar="URL", help="The Hub to ask, instead of $HF_ENDPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the evidence as JSON.")
def retarget_command(
    release: str,
    base: str,
    kind: str | None,
    text: Path | None,
    limit: int | None,
    trained_on: str | None,
    out: Path,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Re-fit an adapter for another version of its base: FP4 for NF4, 4 bits for 16, another block size.

    The new factors hold, beside what was trained, the nearest of their rank to what the two versions differ
    in. With --text that is as the layers' own inputs see it, and the answer is measured: KL of the adapter on
    the new base to the adapter on the old one, before and after, on every fourth text, which nothing was
    fitted on; the better factors are kept. Without, it is not measured. Makes a release that names the new
    base, evidence/retarget.json in it.
    """
    from adapterhub.packaging.files import check_target
    from adapterhub.packaging.temporary import scratch_beside

    began = time.perf_counter()
    check_target(out)
    move = plan_move(open_checked(release, endpoint), base, kind, text, limit, trained_on, endpoint)
    with scratch_beside(out) as scratch:
        outcome = refit_move(move, scratch)
        evidence = describe_move(move, outcome, text, began)
        _write(move, outcome, evidence, out)
    click.echo(evidence.model_dump_json(indent=2) if as_json else _as_text(evidence, out))


def _write(move: Move, outcome: Outcome, evidence: RetargetEvidence, out: Path) -> None:
    """The new release: the factors kept, the tokenizer as it was, and of the evidence what training left."""
    from adapterhub.packaging.adapter import CONFIG_NAME, WEIGHTS_NAME
    from adapterhub.packaging.companions import copy_tokenizer
    from adapterhub.packaging.evidence import to_json
    from adapterhub.packaging.release import new_release
    from adapterhub.packaging.retarget import RETARGET

    with new_release(out, _draft(move)) as staging:
        shutil.copyfile(outcome.folder / CONFIG_NAME, staging / CONFIG_NAME)
        kept = outcome.folder if outcome.kept_is_refitted else move.release.path
        shutil.copyfile(kept / WEIGHTS_NAME, staging / WEIGHTS_NAME)
        copy_tokenizer(move.release.path, staging)
        (staging / "evidence").mkdir()
        for name in _TRAINING:
            if (move.release.path / name).is_file():
                shutil.copyfile(move.release.path / name, staging / name)
        (staging / RETARGET).write_bytes(to_json(evidence))


def _draft(move: Move) -> Manifest:
    from adapterhub.packaging.manifest import Parent

    manifest = move.release.manifest
    suffix = f"-on-{move.new.quantization.type if move.new.quantization else 'bf16'}"
    return manifest.model_copy(
        update={
            "name": manifest.name[: 96 - len(suffix)] + suffix,
            "created": datetime.now(UTC).replace(microsecond=0),
            "base": move.lock,
            "parent": Parent(ref=f"{manifest.name}@{manifest.version}", manifest_sha256=move.release.digest),
            "tools": {name: version(name) for name in TOOLS},
            "hardware": None,
            "files": {},
        }
    )


def _as_text(evidence: RetargetEvidence, out: Path) -> str:
    before, after = evidence.as_it_was, evidence.refitted
    lines = [
        ("release", f"{out}, from {evidence.parent}"),
        ("base", f"{evidence.new_base.name} in {words_of(evidence.new_base.quantization)}"),
        ("before", f"{evidence.old_base.name} in {words_of(evidence.old_base.quantization)}"),
    ]
    if before is None or after is None:
        lines.append(("KL", "not measured: name a --text"))
    else:
        lines += [
            (
                "KL",
                f"{before.kl_mean:.4f} nats a token with the adapter as it was, {after.kl_mean:.4f} re-fitted"
                f", on {evidence.measured} texts",
            ),
            ("top-1", f"{before.top1_agreement:.4f} of tokens agree, {after.top1_agreement:.4f} re-fitted"),
            ("kept", f"the adapter {evidence.kept}"),
            _verdict(min(before.kl_mean, after.kl_mean)),
        ]
    worst = sorted(evidence.layers, key=lambda layer: -layer.error_after)[:3]
    lines += [
        ("layer", f"{layer.name}: relative error {layer.error_before:.4f}, re-fitted {layer.error_after:.4f}")
        for layer in worst
    ]
    return "\n".join(f"{label:<12} {words}" for label, words in lines)


def _verdict(kl: float) -> tuple[str, str]:
    if kl <= RIDES:
        return "rides", f"yes: {kl:.4f} is not above {RIDES} nats a token"
    return "rides", f"not well: {kl:.4f} is above {RIDES} nats a token; train it on that base instead"
