"""What both renderings of a card print: the same facts and sentences, for README.md and for the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapterhub.cards import changes, formats, lineage, measurements, prose, provenance, refitting
from adapterhub.cards.card import Card
from adapterhub.cards.failures import CLASSES, expected_text
from adapterhub.cards.probes import DESCRIPTIONS
from adapterhub.cards.snippets import describe_base, render_snippets
from adapterhub.cards.tables import Table
from adapterhub.cards.words import render_words


@dataclass(frozen=True)
class Section:
    """A part of the card that tables fill; without tables it was not measured."""

    title: str
    tables: tuple[Table, ...]
    words: str | None
    command: str | None
    """What measures it."""
    picture_in_words: str | None = None


def gather(card: Card) -> dict[str, Any]:
    """The templates' variables, as plain text; the renderer escapes them."""
    return {
        "card": card,
        "summary": prose.summarize(card),
        "not_this": prose.what_it_does_not(card),
        "headline": prose.headline(card),
        "tests_in_words": prose.describe_tests(card),
        "failures_in_words": prose.describe_failures(card),
        "run_in_words": prose.describe_run(card),
        "limits": prose.limits(card),
        "snippets": render_snippets(card),
        "base_in_words": describe_base(card),
        "lineage_in_words": lineage.describe_lineage(card),
        "measured": _measured(card),
        "misses": measurements.tabulate_misses(card.ledger) if card.ledger else None,
        "costs": measurements.tabulate_costs(card.curve),
        "fidelity": _fidelity(card),
        "refit": _refit(card),
        "changes": changes.describe_changes(card),
        "words": render_words(card.words, facts_for_words(card)),
        "facts": provenance.list_facts(card),
        "recipe": _to_yaml(card.manifest.recipe),
        "commands": {
            "measure": provenance.command_to_measure(card),
            "digest": provenance.command_to_digest(card),
            "fidelity": provenance.command_to_compare(card),
            "since": provenance.command_to_tell_changes(card),
            "replay": provenance.command_to_replay(card),
            "verify": provenance.commands_to_verify(card),
        },
    }


def facts_for_words(card: Card) -> dict[str, Any]:
    """What an author's template may name: every value is text, or a mapping of texts."""
    manifest = card.manifest
    facts: dict[str, Any] = {
        "name": manifest.name,
        "version": manifest.version,
        "base": card.base.name,
        "task": manifest.task or "not said",
        "licence": card.licensing.licence or "not stated",
        "failures": formats.NOT_MEASURED if card.failures is None else f"{len(card.failures):,}",
        "scores": {},
    }
    for score in card.scores.scores if card.scores else ():
        facts["scores"][score.metric] = {
            "base": formats.value_of(score, score.base),
            "adapter": formats.value_of(score, score.adapter),
            "base_interval": formats.interval_of(score, score.base_interval),
            "adapter_interval": formats.interval_of(score, score.adapter_interval),
            "rows": f"{score.rows:,}",
        }
    return facts


def _measured(card: Card) -> list[Section]:
    """What was measured beside the scores, and what was not."""
    probes, tasks, precisions = card.probes, card.tasks, card.precisions
    command = provenance.command_to_measure(card).rstrip()
    release = f"adapterhub eval {card.folder}"
    return [
        Section(
            "Probes",
            (measurements.tabulate_probes(probes),) if probes else (),
            measurements.describe_probes(probes) if probes else None,
            f"{release} --probes all",
        ),
        Section(
            "Benchmarks",
            (measurements.tabulate_tasks(tasks),) if tasks else (),
            measurements.describe_tasks(tasks) if tasks else None,
            f"{release} --tasks TASK",
        ),
        Section(
            "What quantization cost",
            (measurements.tabulate_precisions(precisions), measurements.tabulate_differences(precisions))
            if precisions
            else (),
            measurements.describe_precisions(precisions) if precisions else None,
            f"{command} --precisions",
        ),
    ]


def _fidelity(card: Card) -> Section | None:
    """How true a merged model is to its adapter; None for an adapter that nobody compared."""
    fidelity = card.fidelity
    if fidelity is None:
        return None if card.manifest.kind == "adapter" else Section("Merge fidelity", (), None, None)
    return Section(
        "Merge fidelity",
        (measurements.tabulate_fidelity(fidelity),),
        measurements.describe_fidelity(fidelity, card.rounding),
        None,
        measurements.describe_layers(fidelity),
    )


def _refit(card: Card) -> Section | None:
    """What re-fitting for another base did; None for what was not re-fitted."""
    if card.retarget is None:
        return None
    figures, layers = refitting.tabulate_refit(card.retarget), refitting.tabulate_layers(card.retarget)
    return Section(
        "Re-fitted for another base",
        (layers,) if figures is None else (figures, layers),
        refitting.describe_refit(card.retarget),
        None if figures else provenance.command_to_refit(card, card.retarget),
    )


def filters() -> dict[str, Callable[..., str]]:
    """The templates' filters that turn figures into words."""
    return {
        "bytes": formats.in_bytes,
        "class_in_words": lambda name: CLASSES.get(name) or DESCRIPTIONS.get(name, ""),
        "expected": expected_text,
        "figures": formats.in_figures,
        "hardware": formats.hardware_in_words,
        "interval_of": formats.interval_of,
        "metric": formats.METRICS.__getitem__,
        "rows_of": formats.rows_of,
        "time": formats.in_time,
        "value_of": formats.value_of,
    }


def _to_yaml(recipe: dict[str, Any] | None) -> str | None:
    import yaml

    return None if recipe is None else yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
