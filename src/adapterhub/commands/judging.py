"""What merge and requantize measure before a result gets its name: options, texts, and the limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from adapterhub.commands.comparing import MeasuredText, Side, measure_fidelity, worst_layers
from adapterhub.errors import DataError, RecipeError, ReleaseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from adapterhub.packaging.calibration.calibrate import CalibrationText
    from adapterhub.packaging.evidence import FidelityEvidence
    from adapterhub.packaging.layout import Storage
    from adapterhub.packaging.manifest import BaseMismatch

Command = Callable[..., Any]
RoundingChoice = Literal["calibrated", "nearest"]

WARNED_KL = 0.05
"""Nats a token above which a result is warned of where no limit is given."""


def measuring_options(command: Command) -> Command:
    """``--text``, ``--held-out``, ``--rounding``, ``--max-kl``, ``--no-fidelity``: for ``read_measuring``."""
    path = click.Path(path_type=Path)
    options = (
        click.option(
            "--text",
            type=path,
            metavar="FILE",
            help="Text like the adapter's own, rows or plain: nf4 and fp4 codes are chosen on most of it, "
            "and the result is measured on its last texts; where none are chosen, on its first.",
        ),
        click.option(
            "--held-out", type=path, metavar="FILE", help="Measure on this text instead of a part of --text."
        ),
        click.option(
            "--rounding",
            type=click.Choice(["calibrated", "nearest"]),
            help="How nf4 and fp4 codes are chosen. Default: calibrated where there is --text.",
        ),
        click.option(
            "--max-kl",
            type=click.FloatRange(min=0),
            metavar="X",
            help=f"Fail, leaving nothing, above X nats a token. Default: warn above {WARNED_KL}.",
        ),
        click.option("--no-fidelity", is_flag=True, help="Do not measure the result."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dataclass(frozen=True)
class Measuring:
    """What the options ask for."""

    calibration: CalibrationText | None
    """None: each weight goes to its nearest code."""
    held_out: MeasuredText | None
    """None: nothing is measured."""
    max_kl: float | None

    @property
    def rounding(self) -> RoundingChoice:
        return "calibrated" if self.calibration else "nearest"


def read_measuring(
    storage: Storage,
    load_tokenizer: Callable[[], PreTrainedTokenizerBase],
    text: Path | None,
    held_out: Path | None,
    rounding: RoundingChoice | None,
    max_kl: float | None,
    no_fidelity: bool,
) -> Measuring:
    """Read the texts that the options name, and say on stderr what is not done for want of one.

    Raises RecipeError for options that contradict each other, DataError for a text that cannot be used.
    """
    four_bits = storage in ("nf4", "fp4")
    if rounding == "calibrated" and not four_bits:
        raise RecipeError(
            f"--rounding calibrated chooses 4-bit codes, and {storage} has none", "leave it out"
        )
    if rounding == "calibrated" and text is None:
        raise RecipeError("--rounding calibrated needs text to choose codes on", "name it with --text FILE")
    if max_kl is not None and not math.isfinite(max_kl):
        raise RecipeError(
            f"--max-kl {max_kl} is no limit", "give a number, or leave it out to be warned only"
        )
    if max_kl is not None and (no_fidelity or (text is None and held_out is None)):
        raise RecipeError("--max-kl needs the result to be measured", "name text with --text FILE")
    if no_fidelity and held_out is not None:
        raise RecipeError("--held-out names text that --no-fidelity does not use", "leave one of them out")
    calibrated = four_bits and text is not None and rounding != "nearest"
    if four_bits and not calibrated:
        click.echo(
            f"rounding to nearest: a step between {storage} codes is far larger than what training usually "
            "changes, so much of it can get lost; --text FILE chooses codes that keep it",
            err=True,
        )
    if not no_fidelity and text is None and held_out is None:
        click.echo("not measured how faithful the result is: that needs --text FILE", err=True)
    if text is None and (held_out is None or no_fidelity):
        return Measuring(None, None, max_kl)
    return _read(load_tokenizer(), text, held_out, calibrated, max_kl, no_fidelity)


def _read(
    tokenizer: PreTrainedTokenizerBase,
    text: Path | None,
    held_out: Path | None,
    calibrated: bool,
    max_kl: float | None,
    no_fidelity: bool,
) -> Measuring:
    from adapterhub.trainer.texts import MEASURED, read_texts, sample_texts, split_texts

    named = [path for path in (text, held_out) if path is not None and path.exists()]
    if len(named) == 2 and named[0].samefile(named[1]):
        raise DataError(
            f"{named[0]} cannot be both chosen on and measured on",
            "leave --held-out out: the end of --text is kept apart for it",
        )
    calibration, measured = None, None
    if held_out is not None:
        measured = MeasuredText(held_out, read_texts(held_out, tokenizer, limit=MEASURED), limit=MEASURED)
        if calibrated:
            assert text is not None
            calibration = _calibration(text, sample_texts(text, tokenizer))
    elif text is not None and calibrated and no_fidelity:
        calibration = _calibration(text, sample_texts(text, tokenizer))
    elif text is not None and calibrated:
        split = split_texts(text, tokenizer)
        calibration = _calibration(text, split.calibration)
        measured = MeasuredText(text, split.held_out, skipped=split.skipped)
    elif text is not None and not no_fidelity:
        measured = MeasuredText(text, read_texts(text, tokenizer, limit=MEASURED), limit=MEASURED)
    return Measuring(calibration, measured, max_kl)


def _calibration(text: Path, texts: list[list[int]]) -> CalibrationText:
    from adapterhub.packaging.calibration.calibrate import CalibrationText
    from adapterhub.packaging.files import sha256_file

    def report(done: int, total: int) -> None:
        click.echo(f"choosing codes: decoder layer {done} of {total}", err=True)

    return CalibrationText(text.name, sha256_file(text), texts, report)


@dataclass
class Judge:
    """Measures finished checkpoints against one reference, which is loaded when it is first needed."""

    measuring: Measuring
    load_reference: Callable[[list[BaseMismatch]], Side]
    """Is given a list to put another base into that was allowed."""
    kept: Callable[[Side, Any], float | None] = lambda _reference, _model: None
    """Delta survival of the reference's update in a model, before either answers anything."""
    limited: bool = True
    """Whether a result over the limit is refused at once."""
    evidence: FidelityEvidence | None = None
    """Of the checkpoint that was examined last."""
    _mismatches: list[BaseMismatch] = field(default_factory=list)
    _reference: Side | None = None

    def examine(self, folder: Path) -> Mapping[str, bytes]:
        """Measure the checkpoint in ``folder``; what is to lie beside it. ReleaseError over the limit."""
        from adapterhub.load import default_device
        from adapterhub.packaging.evidence import FIDELITY, to_json
        from adapterhub.trainer.model import load_base

        text = self.measuring.held_out
        assert text is not None
        if self._reference is None:
            self._reference = self.load_reference(self._mismatches)
        model = load_base(folder, None, default_device()).eval()
        candidate = Side(folder.name, folder, None, model, self._reference.tokenizer)
        survival = self.kept(self._reference, model)
        evidence = measure_fidelity(self._reference, candidate, text, survival)
        self.evidence = evidence.model_copy(update={"base_mismatch": next(iter(self._mismatches), None)})
        if self.limited:
            check_kl(self.evidence, self.measuring.max_kl)
        return {FIDELITY: to_json(self.evidence)}


def check_kl(evidence: FidelityEvidence, limit: float | None) -> None:
    """Raise ReleaseError when the mean KL is over ``limit``; without one, warn above ``WARNED_KL``."""
    kl = evidence.figures.kl_mean
    worst = "; ".join(worst_layers(evidence))
    if limit is not None and kl > limit:
        raise ReleaseError(
            f"the result is {kl:.4f} nats a token from {evidence.reference}, over the limit of {limit:g}; "
            f"furthest: {worst}",
            "choose codes on more text (--text), another --to (or --onto), or a higher --max-kl",
        )
    if limit is None and kl > WARNED_KL:
        click.echo(
            f"warning: {kl:.4f} nats a token from {evidence.reference}, more than {WARNED_KL}; "
            f"furthest: {worst}",
            err=True,
        )
