"""Tables of what was measured beside the scores: probes, benchmarks, precisions, fidelity, memory misses."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub.cards.formats import (
    NOT_MEASURED,
    hardware_in_words,
    in_bytes,
    in_figures,
    in_interval,
    in_p_value,
    in_percent,
    in_percent_interval,
    in_time,
)
from adapterhub.cards.tables import Cell, Table, code, make_table, strong
from adapterhub.packaging.evidence import CurveEvidence, FidelityEvidence, LedgerEvidence, RoundingEvidence
from adapterhub.packaging.precisions import PrecisionsEvidence, Side, SideDifference
from adapterhub.packaging.probes import ProbeScore, ProbesEvidence
from adapterhub.packaging.tasks import TaskScore, TasksEvidence

_INTERVAL = "#95 % interval"
_SHOWN = "the test shows"
_SIDES: dict[Side, str] = {
    "base_16_bit": "base in 16 bits",
    "base_quantized": "base, quantized",
    "adapter": "adapter on the quantized base",
}


def tabulate_probes(probes: ProbesEvidence) -> Table:
    """One row a class or tier: both sides with their intervals, and what the paired test shows."""
    columns = ("probes of", "#n", "#base", _INTERVAL, "#adapter", _INTERVAL, "#p", _SHOWN)
    return make_table("Probes by class", columns, map(_probe_row, probes.scores))


def _probe_row(score: ProbeScore) -> tuple[str | Cell, ...]:
    name = score.probe_class.replace("_", " ") + (f", {score.tier}" if score.tier else "")
    return (
        name,
        f"{score.probes:,}",
        in_percent(score.base),
        in_percent_interval(score.base_interval),
        strong(in_percent(score.adapter)),
        in_percent_interval(score.adapter_interval),
        in_p_value(score.p_adjusted),
        score.verdict,
    )


def describe_probes(probes: ProbesEvidence) -> str:
    """Where the probes come from, how they were tested, and which answers were cut or empty."""
    suites = "; ".join(
        f"{suite.probes:,} {suite.source}" + (f" (seed {suite.seed})" if suite.seed is not None else "")
        for suite in probes.suites
    )
    text = (
        f"Probes: {suites}. Both sides answered greedily. Intervals are Wilson's; p is McNemar's exact test "
        "on the same probes, after Holm's correction for all rows of the table; better and worse are said "
        "below 0.05 only."
    )
    for what, count in (
        ("ran into the token limit", sum(score.adapter_unfinished for score in probes.scores)),
        ("were empty", sum(score.adapter_empty for score in probes.scores)),
    ):
        text += f" Of the adapter's answers, {count:,} {what}." if count else ""
    if probes.left_out:
        text += f" {probes.left_out:,} probes were left out: they do not fit the base's context."
    return text


def tabulate_tasks(tasks: TasksEvidence) -> Table:
    """One row a metric of a task."""
    columns = ("task", "metric", "#n", "#base", "#± or 95 %", "#adapter", "#± or 95 %", "#p", _SHOWN)
    return make_table("Benchmarks", columns, map(_task_row, tasks.scores))


def _task_row(score: TaskScore) -> tuple[str | Cell, ...]:
    name = score.metric + (f", {score.filter}" if score.filter != "none" else "")
    return (
        f"{score.task} (version {score.version}, {score.few_shot} examples)",
        name,
        f"{score.questions:,}",
        in_figures(score.base),
        _spread(score.base_interval, score.base_error),
        strong(in_figures(score.adapter)),
        _spread(score.adapter_interval, score.adapter_error),
        in_p_value(score.p_adjusted),
        score.verdict or "not tested",
    )


def _spread(interval: tuple[float, float] | None, error: float | None) -> str:
    if interval is not None:
        return in_interval(interval)
    return f"± {in_figures(error)}" if error is not None else NOT_MEASURED


def tabulate_precisions(precisions: PrecisionsEvidence) -> Table:
    """The three sides on the same rows."""
    columns = ("side", "#exact match", _INTERVAL, "#loss", _INTERVAL, "#bits a byte")
    rows = (
        (
            _SIDES[side.side],
            strong(in_percent(side.exact_match)),
            in_percent_interval(side.exact_match_interval),
            strong(in_figures(side.loss)),
            in_interval(side.loss_interval),
            in_figures(side.bits_per_byte),
        )
        for side in precisions.sides
    )
    return make_table("The base in 16 bits, quantized, and with the adapter", columns, rows)


def tabulate_differences(precisions: PrecisionsEvidence) -> Table:
    """What quantization cost and training bought, row by row compared."""
    columns = ("difference", "#loss", _INTERVAL, "the interval shows", "#exact match", "#p", _SHOWN)
    parts = (
        ("what quantization cost", precisions.cost),
        ("what training bought", precisions.bought),
        ("both together", precisions.net),
    )
    return make_table("Differences", columns, (_difference_row(name, part) for name, part in parts))


def _difference_row(name: str, part: SideDifference) -> tuple[str | Cell, ...]:
    return (
        name,
        f"{part.loss:+.4f}",
        in_interval(part.loss_interval),
        part.loss_verdict or "not tested",
        f"{100 * part.exact_match:+.1f} points",
        in_p_value(part.exact_match_p_value),
        part.exact_match_verdict,
    )


def describe_tasks(tasks: TasksEvidence) -> str:
    """What ran them, and how they were tested."""
    return (
        f"Run by lm-eval {tasks.lm_eval} in {in_time(tasks.seconds)} on {hardware_in_words(tasks.hardware)}. "
        "Where each question is right or wrong, intervals are Wilson's and p is McNemar's exact test after "
        "Holm's correction; of other metrics nothing is claimed."
    ) + _contamination(tasks)


def _contamination(tasks: TasksEvidence) -> str:
    """How many questions of each task share words with the training rows."""
    counted = {score.task: score for score in tasks.scores}
    known = [
        f"{score.contaminated:,} of {score.questions:,} of {name}"
        for name, score in counted.items()
        if score.contaminated is not None
    ]
    if not known:
        return " What the questions share with the training rows: not measured."
    return f" Questions that share 13 words in a row with a training row: {', '.join(known)}."


def describe_precisions(precisions: PrecisionsEvidence) -> str:
    """Which rows, which quantization, which tests."""
    return (
        f"All three on the same {precisions.rows:,} rows of {precisions.data.source} "
        f"({precisions.tokens:,} tokens); quantized: {precisions.quantization}. A difference in loss is "
        "below 0 where the first is better; its interval takes rows as clusters, p is McNemar's exact test."
    )


def tabulate_costs(curve: CurveEvidence | None) -> Table | None:
    """Time and energy of the training run; None without a run."""
    if curve is None:
        return None
    rows = (
        ("training, wall time", strong(in_time(curve.seconds))),
        ("tokens a second", strong(f"{curve.tokens_per_second:,.0f}")),
        ("on", hardware_in_words(curve.hardware)),
        ("energy", NOT_MEASURED),
    )
    return make_table("Time and energy", ("cost", "#value"), rows)


def tabulate_fidelity(fidelity: FidelityEvidence) -> Table:
    """How far the release's predictions are from its reference's."""
    return make_table("Merge fidelity in figures", ("figure", "#value"), _fidelity_rows(fidelity))


def _fidelity_rows(fidelity: FidelityEvidence) -> Iterator[tuple[str, Cell]]:
    figures = fidelity.figures
    yield "KL from the reference, mean, nats a token", strong(in_figures(figures.kl_mean))
    yield "the same, 99th percentile", strong(in_figures(figures.kl_p99))
    yield "same most likely token", strong(in_percent(figures.top1_agreement))
    yield "perplexity of the reference", strong(in_figures(figures.reference_perplexity))
    yield "perplexity of this release", strong(in_figures(figures.candidate_perplexity))
    survival = fidelity.delta_survival
    yield (
        "share of the adapter's update that is in the weights",
        strong(in_percent(survival)) if survival is not None else Cell(NOT_MEASURED),
    )


def describe_fidelity(fidelity: FidelityEvidence, rounding: RoundingEvidence | None) -> str:
    """What was compared with what, on what; and how codes and target were picked, where they were."""
    words = (
        f"Compared with {fidelity.reference} on {fidelity.figures.tokens:,} tokens of {fidelity.texts:,} "
        f"texts from {fidelity.text}, each token given all before it."
    )
    if rounding is not None:
        chosen = sum(error.chosen for error in rounding.weights)
        nearest = sum(error.nearest for error in rounding.weights)
        kept = sum(error.chosen >= error.nearest for error in rounding.weights)
        words += f" The 4-bit codes were chosen on {rounding.texts:,} other texts ({rounding.text})"
        if nearest > 0:
            words += (
                f": the layers' output error is {in_percent(chosen / nearest)} of that of the nearest codes"
            )
        words += f"; {kept} of {len(rounding.weights)} tensors kept the nearest." if kept else "."
    other = fidelity.instead_of
    if other is not None:
        words += (
            f" Merged onto {other.onto} weights instead, it finds the text less likely "
            f"({in_figures(other.candidate_nll)} nats a token, "
            f"this {in_figures(fidelity.figures.candidate_nll)})."
        )
    return words


def describe_layers(fidelity: FidelityEvidence) -> str | None:
    """What the error by layer shows, in words; also the picture's text alternative. None without layers."""
    layers = fidelity.figures.layers
    if not layers:
        return None
    worst = max(layers, key=lambda layer: layer.relative_error)
    return (
        f"Relative error of each decoder layer's output: {in_figures(layers[0].relative_error)} after the "
        f"first of {len(layers)}, {in_figures(layers[-1].relative_error)} after the last, largest in "
        f"{worst.name} ({in_figures(worst.relative_error)})."
    )


def tabulate_misses(ledger: LedgerEvidence) -> Table | None:
    """Plans that were predicted to fit and ran out of memory; None when there were none."""
    if not ledger.misses:
        return None
    columns = (
        "#after step", "#predicted", "#held then", "#rows at once", "#layers recomputed",
        "what the device said",
    )  # fmt: skip
    rows = (
        (
            f"{miss.step:,}",
            in_bytes(miss.predicted_peak_bytes),
            "not measured" if miss.measured_peak_bytes is None else in_bytes(miss.measured_peak_bytes),
            f"{miss.micro_batch:,}",
            f"{miss.layers_recomputed:,}",
            code(miss.message),
        )
        for miss in ledger.misses
    )
    return make_table("Plans that did not fit", columns, rows)
