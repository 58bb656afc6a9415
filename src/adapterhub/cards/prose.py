"""The card's sentences, each built from facts of the release; renderers escape them."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.cards.card import Card
from adapterhub.cards.formats import (
    METRICS,
    hardware_in_words,
    in_bytes,
    in_figures,
    in_p_value,
    in_percent,
    in_time,
    interval_of,
    quantization_in_words,
)
from adapterhub.packaging.evidence import Contamination, FailureCase
from adapterhub.packaging.manifest import DatasetLock, Manifest, Quantization


def summarize(card: Card) -> str:
    """What the release is, in one paragraph: task, base, size, rank, rows, run."""
    return " ".join([*_what_it_is(card), *_how_it_was_made(card)])


def what_it_does_not(card: Card) -> str:
    """Where it is known to fail and what nobody looked at, in one paragraph."""
    score = card.score("exact_match")
    if score is None:
        known = "How often its answers are right was not measured."
    else:
        wrong = score.rows - round(score.adapter * score.rows)
        known = (
            f"Of {score.rows:,} held-out rows it answers {wrong:,} wrongly"
            + (": they are kept below as failure cases, to be asked again." if card.failures else ".")
            if wrong
            else f"None of {score.rows:,} held-out rows shows a failure."
        )
    seen = [
        f"{sum(score.probes for score in card.probes.scores):,} probes" if card.probes else "",
        f"{len({score.task for score in card.tasks.scores})} benchmarks" if card.tasks else "",
    ]
    others = _listed([words for words in seen if words]) if any(seen) else ""
    if not others:
        return f"{known} What it does outside its task, in other languages, or under attack was not measured."
    return f"{known} Outside its task, {others} below say what was looked at; nothing else was measured."


def headline(card: Card) -> str | None:
    """The result in one sentence, or None when exact match was not measured."""
    score = card.score("exact_match")
    if score is None or card.scores is None:
        return None
    shown = f" Paired test: {score.verdict}." if score.verdict else ""
    return (
        f"Of {score.rows:,} rows of {card.scores.data.source}, the adapter answers "
        f"{in_percent(score.adapter)} exactly as expected (95 % interval "
        f"{interval_of(score, score.adapter_interval)}), the base {in_percent(score.base)} "
        f"({interval_of(score, score.base_interval)}).{shown}"
    )


def describe_tests(card: Card) -> str:
    """What the paired tests of the scores show, where any were made."""
    tested = [score for score in (card.scores.scores if card.scores else ()) if score.verdict]
    return " ".join(
        f"Paired test of {METRICS[score.metric]}, row by row: {score.verdict}"
        + (f" (p {in_p_value(score.p_value)})." if score.p_value is not None else ".")
        for score in tested
    )


def describe_failures(card: Card) -> str:
    """How many failure cases are known, and how many of them the base gets right."""
    if card.failures is None:
        return "Not measured."
    asked = _asked_in_words(card)
    if not card.failures:
        among = _listed(list(asked.values())) if asked else "the questions"
        return f"None among {among} that were asked. That is no claim about other questions."
    count = len(card.failures)
    found = f"{count:,} recorded {'case' if count == 1 else 'cases'}"
    sources = _sources_in_words(card.failures, asked)
    if len(sources) == 1:
        found += sources[0].removeprefix(f"{count:,}")
    else:
        found += f", {', '.join(sources)}"
    regressed = card.regressions
    base = (
        f"the base answers {regressed:,} of them right"
        if regressed
        else "the base answers none of them right"
    )
    return f"{found}; {base}."


def _asked_in_words(card: Card) -> dict[str, str]:
    """What kind of measurement -> how much it asked."""
    asked = {}
    if card.scores:
        asked["rows"] = f"{card.scores.data.rows:,} rows"
    if card.probes:
        asked["probes"] = f"{sum(score.probes for score in card.probes.scores):,} probes"
    return asked


def _sources_in_words(cases: Sequence[FailureCase], asked: dict[str, str]) -> list[str]:
    """How many cases come from where: ``3 from 60 rows``, ``1 added by hand``."""
    sources = []
    for kind, unknown in (("rows", "rows"), ("probes", "probes"), ("mining", None)):
        count = sum(case.found_in == kind and not case.added for case in cases)
        if count:
            where = f"from {asked.get(kind, unknown)}" if unknown else "searched for"
            sources.append(f"{count:,} {where}")
    added = sum(case.added for case in cases)
    return [*sources, f"{added:,} added by hand"] if added else sources


def limits(card: Card) -> list[str]:
    """What the figures do not cover, and what was not measured."""
    found = []
    if card.scores is None:
        found.append("Base beside adapter: not measured.")
    else:
        found += _score_limits(card)
    measured = (card.scores, card.probes, card.tasks, card.precisions)
    others = [it.base_mismatch for it in measured if it is not None and it.base_mismatch is not None]
    for other in dict.fromkeys(others):
        found.append(f"Measured on another base ({'; '.join(other.differs)}): {_as_sentence(other.reason)}")
    if card.curve is None:
        found.append("Training curve: not measured.")
    if card.ledger is None:
        found.append("Memory: not measured.")
    elif card.ledger.measured_peak_bytes is None:
        found.append("Peak memory: not measured; the ledger is a prediction.")
    if card.manifest.kind == "adapter":
        found.append(
            f"The adapter belongs to one base, {card.base.name} with base digest {card.base.digest[:12]}…; "
            "on any other its behaviour was not measured."
        )
    return found + _licence_limits(card)


def _licence_limits(card: Card) -> list[str]:
    licensing = card.licensing
    found = []
    if card.manifest.licence is None:
        carried = f"; base and data are under {licensing.licence}" if licensing.is_carried else ""
        found.append(f"Its author states no licence{carried}.")
    found += [f"Licence: {conflict}. Told by the names alone." for conflict in licensing.conflicts]
    return found


def _stored_in(manifest: Manifest) -> str | None:
    """What a merge left the linear layers in, where it quantized them."""
    if manifest.merge is None or manifest.merge.dtype == "bfloat16":
        return None
    return f" held in {quantization_in_words(Quantization(type=manifest.merge.dtype))}"


def _what_it_is(card: Card) -> list[str]:
    manifest, base = card.manifest, card.base
    held = f" held in {quantization_in_words(base.quantization)}"
    kinds = {
        "adapter": f"is a LoRA adapter for {base.name}{held}.",
        "merged": f"is {base.name} with an adapter merged into its weights.",
        "quantized": f"is {base.name} with an adapter merged into it,{_stored_in(manifest) or held}.",
    }
    sentences = [f"{manifest.name} {manifest.version} {kinds[manifest.kind]}"]
    if manifest.task:
        sentences.append(f"Its task: {_as_sentence(manifest.task)}")
    size = in_bytes(card.weights_bytes)
    if card.adapter and card.target_modules:
        shape = f"rank {card.adapter.r} and alpha {card.adapter.lora_alpha:g}"
        sentences.append(f"It has {shape} on {_listed(card.target_modules)}, and its weights take {size}.")
    else:
        sentences.append(f"Its weights take {size}.")
    return sentences


def _how_it_was_made(card: Card) -> list[str]:
    sentences = []
    trained = card.rows("train")
    if trained:
        sentences.append(f"It was trained on {_listed([_rows_in_words(data) for data in trained])}.")
    if card.retarget:
        old = card.retarget.old_base
        held = quantization_in_words(old.quantization)
        sentences.append(f"It was trained for {old.name} held in {held}, then re-fitted without training.")
    curve = card.curve
    if curve:
        sentences.append(
            f"The run took {curve.steps:,} optimizer steps over {curve.train_tokens:,} tokens, "
            f"{in_time(curve.seconds)} on {hardware_in_words(curve.hardware)}."
        )
    return sentences


def _score_limits(card: Card) -> list[str]:
    assert card.scores is not None
    scores = card.scores
    found = []
    if card.measured_on_training_rows:
        found.append("The scored rows are the training rows: the scores say nothing about unseen ones.")
    else:
        found.append(
            f"Scores come from {scores.data.rows:,} rows of {scores.data.source}; "
            "questions of another kind, other languages and general abilities: not measured."
        )
    held = quantization_in_words(card.base.quantization)
    others = "" if card.precisions else "; in other precisions: not measured"
    found.append(f"Base and adapter were both measured on the base in {held}{others}.")
    found.append("Answers were generated greedily; with sampling: not measured.")
    if scores.left_out:
        found.append(f"{scores.left_out:,} rows were left out: prompt and answer exceed the context.")
    found.append(_contamination_in_words(scores.contamination))
    return found


def _contamination_in_words(found: Contamination | None) -> str:
    if found is None:
        return "What the scored rows share with the training rows: not measured."
    one = found.same_prompts == 1
    text = (
        f"{found.same_prompts:,} of the scored rows {'has' if one else 'have'} the prompt of a training row, "
        f"and {found.shared_sequences:,} share 13 words in a row with one, system messages left out "
        f"({found.train_rows:,} rows of {found.train})."
    )
    if not found.is_trained_on:
        text += (
            " Whether those are all the rows that were trained on is not certain: their digest is another."
        )
    return text


def _rows_in_words(data: DatasetLock) -> str:
    return f"{data.rows:,} rows of {data.source}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _as_sentence(text: str) -> str:
    return text if text.rstrip().endswith((".", "!", "?")) else f"{text.rstrip()}."


def describe_run(card: Card) -> str | None:
    """What the curve shows, in words: also the picture's text alternative. None without a curve."""
    if card.curve is None or not card.curve.points:
        return None
    losses = [point for point in card.curve.points if point.loss is not None]
    held_out = [point for point in card.curve.points if point.eval_loss is not None]
    parts = []
    if losses:
        first, last = losses[0], losses[-1]
        parts.append(
            f"Training loss went from {in_figures(first.loss)} at step {first.step} "
            f"to {in_figures(last.loss)} at step {last.step}"
        )
    if held_out:
        first, last = held_out[0], held_out[-1]
        best = min(held_out, key=lambda point: point.eval_loss or 0.0)
        parts.append(
            f"held-out loss from {in_figures(first.eval_loss)} at step {first.step} "
            f"to {in_figures(last.eval_loss)} at step {last.step}"
            f" (lowest {in_figures(best.eval_loss)} at step {best.step})"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}, in nats a token." if parts else None
