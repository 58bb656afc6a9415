"""An adapter re-fitted for another version of its base: what that did, in words and tables."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub.cards.formats import (
    NOT_MEASURED,
    hardware_in_words,
    in_figures,
    in_percent,
    in_time,
    quantization_in_full,
)
from adapterhub.cards.tables import Cell, Table, make_table, strong
from adapterhub.packaging.retarget import RetargetEvidence

_LAYERS_SHOWN = 10
_KEPT = {"refitted": "as they were re-fitted", "as it was": "as they were, which did better"}


def tabulate_refit(evidence: RetargetEvidence) -> Table | None:
    """Both adapters on the new base against the adapter on the old one; None without a text to measure on."""
    if evidence.as_it_was is None or evidence.refitted is None:
        return None
    columns = ("figure, against the adapter on the old base", "#as it was", "#re-fitted")
    return make_table("KL before and after re-fitting", columns, _figure_rows(evidence))


def _figure_rows(evidence: RetargetEvidence) -> Iterator[tuple[str | Cell, ...]]:
    before, after = evidence.as_it_was, evidence.refitted
    assert before is not None
    assert after is not None
    yield "KL, mean, nats a token", strong(in_figures(before.kl_mean)), strong(in_figures(after.kl_mean))
    yield "the same, 99th percentile", in_figures(before.kl_p99), in_figures(after.kl_p99)
    yield "same most likely token", in_percent(before.top1_agreement), in_percent(after.top1_agreement)
    perplexities = (in_figures(it.candidate_perplexity) for it in (before, after))
    yield f"perplexity ({in_figures(before.reference_perplexity)} on the old base)", *perplexities


def tabulate_layers(evidence: RetargetEvidence) -> Table:
    """The layers that are furthest from what they were on the old base, the worst first."""
    worst = sorted(evidence.layers, key=lambda layer: (-layer.error_after, layer.name))[:_LAYERS_SHOWN]
    shown = f"{len(worst)} of {len(evidence.layers)}" if len(worst) < len(evidence.layers) else "all"
    columns = (f"layer, the worst first ({shown})", "#rank", "#error as it was", "#error re-fitted")
    rows = (
        (layer.name, f"{layer.rank}", in_figures(layer.error_before), strong(in_figures(layer.error_after)))
        for layer in worst
    )
    return make_table("Layers before and after re-fitting", columns, rows)


def describe_refit(evidence: RetargetEvidence) -> str:
    """From which base to which, measured on what, and which factors were kept."""
    old, new = evidence.old_base, evidence.new_base
    held = [f"{it.name} in {quantization_in_full(it.quantization)}" for it in (old, new)]
    words = f"{evidence.parent} was trained on {held[0]}; its factors were re-fitted for {held[1]}."
    if evidence.weighting == "inputs":
        words += f" Inputs of the layers were gathered on {evidence.calibrated:,} texts of {evidence.text}."
    if evidence.refitted is None:
        words += f" What became of its answers: {NOT_MEASURED}."
    else:
        # With fewer than four texts there are none to spare: those that were fitted on are measured on, too.
        beside = "the same" if evidence.calibrated == evidence.measured else "other"
        words += (
            f" The figures are of {evidence.refitted.tokens:,} tokens of {evidence.measured:,} {beside} "
            f"texts. This release holds the factors {_KEPT[evidence.kept]}."
        )
    seen = ", as its inputs see them" if evidence.weighting == "inputs" else ""
    return (
        f"{words} A layer's error is that of its weights with the adapter, relative to those on the old base"
        f"{seen}. It took {in_time(evidence.seconds)} on {hardware_in_words(evidence.hardware)}. "
        f"Curve and memory, where they are shown, are those of {evidence.parent}."
    )
