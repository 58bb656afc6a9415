"""Probes asked of the base and of the adapter, and what the answers show."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterhub.cards.checks import passes, read_check
from adapterhub.cards.evaluation import StageReport, describe_decoding, out_of_memory_in_words
from adapterhub.cards.failures import failure_id
from adapterhub.cards.generation import Answer, Decoding, generate_answers
from adapterhub.cards.paired import count_discordant, find, holm, mcnemar
from adapterhub.cards.probes import Probe, Suite
from adapterhub.cards.questions import Prompt, pose_prompt
from adapterhub.cards.scores import wilson_interval
from adapterhub.errors import DataError
from adapterhub.packaging.evidence import FailureCase
from adapterhub.packaging.manifest import BaseMismatch, Hardware, Sha256
from adapterhub.packaging.probes import (
    ProbeAnswer,
    ProbeOutcome,
    ProbeScore,
    ProbesEvidence,
    ProbeSuite,
    failing,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Posed:
    """Probes as prompts of one tokenizer."""

    suites: tuple[ProbeSuite, ...]
    """Of those that can be asked."""
    probes: tuple[Probe, ...]
    prompts: tuple[Prompt, ...]
    """One for each probe."""
    left_out: tuple[str, ...]
    """What cannot be asked, each in words: longer than the context, or refused by the chat template."""


@dataclass(frozen=True)
class Subject:
    """What is probed, and where: goes into the evidence as it is."""

    adapter_sha256: Sha256
    tools: dict[str, str]
    hardware: Hardware
    base_mismatch: BaseMismatch | None = None
    """The base, if it is not the one trained on, and why it was allowed."""


def pose_probes(tokenizer: PreTrainedTokenizerBase, suites: Sequence[Suite], context: int | None) -> Posed:
    """Every probe through the chat template. Raises DataError when none of them can be asked."""
    records: list[ProbeSuite] = []
    kept: list[tuple[Probe, Prompt]] = []
    left_out: list[str] = []
    for suite in suites:
        ours = []
        for probe in suite.probes:
            try:
                prompt = pose_prompt(tokenizer, probe.messages, probe.where)
            except DataError as err:
                left_out.append(err.what)
                continue
            if context is not None and len(prompt.prompt_ids) + probe.max_new_tokens > context:
                left_out.append(
                    f"{probe.where}: prompt and answer do not fit the context of {context} tokens"
                )
                continue
            ours.append((probe, prompt))
        if ours:
            records.append(suite.record(probe for probe, _ in ours))
        kept += ours
    if not kept:
        raise DataError(f"none of {len(left_out)} probes can be asked; {left_out[0]}", "shorten the probes")
    return Posed(
        tuple(records),
        tuple(probe for probe, _ in kept),
        tuple(prompt for _, prompt in kept),
        tuple(left_out),
    )


def ask_probes(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    posed: Posed,
    decoding: Decoding,
    stage: str,
    report: StageReport,
) -> list[Answer]:
    """One model's answer to each probe, within the probe's own limit of tokens; ``stage`` is in words.

    Raises TrainingError when the device runs out of memory.
    """
    limits = [probe.max_new_tokens for probe in posed.probes]
    report(stage, 0, len(limits))
    with out_of_memory_in_words(decoding.batch_size):
        return generate_answers(
            model,
            tokenizer,
            posed.prompts,
            replace(decoding, max_new_tokens=max(limits)),
            partial(report, stage),
            limits,
        )


def probe_both(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    posed: Posed,
    decoding: Decoding,
    subject: Subject,
    report: StageReport,
) -> ProbesEvidence:
    """Ask base (``model`` with its adapter disabled) and adapter the same probes, and score both."""
    model.eval()
    began = time.perf_counter()
    with model.disable_adapter():
        base = ask_probes(model, tokenizer, posed, decoding, "base: probes", report)
    adapter = ask_probes(model, tokenizer, posed, decoding, "adapter: probes", report)
    outcomes = tuple(
        _judge(probe, *answers)
        for probe, answers in zip(posed.probes, zip(base, adapter, strict=True), strict=True)
    )
    settings = describe_decoding(tokenizer, decoding)
    del settings["max_new_tokens"]  # each outcome has its own
    return ProbesEvidence(
        adapter_sha256=subject.adapter_sha256,
        suites=posed.suites,
        decoding=settings,
        scores=score_probes(outcomes),
        outcomes=outcomes,
        left_out=len(posed.left_out),
        base_mismatch=subject.base_mismatch,
        tools=subject.tools,
        hardware=subject.hardware,
        seconds=round(time.perf_counter() - began, 1),
    )


def score_probes(outcomes: Sequence[ProbeOutcome]) -> tuple[ProbeScore, ...]:
    """One score a class, or a tier of it, in the order they first appear; Holm over all of them."""
    groups: dict[tuple[str, str | None], list[ProbeOutcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.probe_class, outcome.tier].append(outcome)
    pairs = [
        count_discordant([o.base.passed for o in group], [o.adapter.passed for o in group])
        for group in groups.values()
    ]
    p_values = [mcnemar(gained, lost) for gained, lost in pairs]
    adjusted = holm(p_values)
    return tuple(
        _score(name, group, pair, p_value, corrected)
        for (name, group), pair, p_value, corrected in zip(
            groups.items(), pairs, p_values, adjusted, strict=True
        )
    )


def find_probe_failures(
    evidence: ProbesEvidence, *, version: str, since: Mapping[str, str]
) -> tuple[FailureCase, ...]:
    """What the adapter fails, as cases that can be asked again; see ``failures.find_failures``."""
    cases: dict[str, FailureCase] = {}
    for outcome in failing(evidence.outcomes):
        case_id = failure_id(outcome.messages, outcome.check)
        cases[case_id] = FailureCase(
            id=case_id,
            failure_class=outcome.probe_class,
            messages=outcome.messages,
            decoding={**evidence.decoding, "max_new_tokens": outcome.max_new_tokens},
            expected=outcome.check,
            observed=outcome.adapter.text,
            base_answer=outcome.base.text,
            base_finished=outcome.base.finished,
            since=since.get(case_id, version),
            found_in="probes",
        )
    return tuple(cases.values())


def _judge(probe: Probe, base: Answer, adapter: Answer) -> ProbeOutcome:
    check = read_check(probe.check, probe.where)

    def answer(said: Answer) -> ProbeAnswer:
        passed = passes(check, said.text, probe.where, finished=said.finished)
        return ProbeAnswer(text=said.text, finished=said.finished, passed=passed)

    return ProbeOutcome(
        id=probe.id,
        probe_class=probe.probe_class,
        tier=probe.tier,
        messages=probe.messages,
        check=probe.check,
        max_new_tokens=probe.max_new_tokens,
        base=answer(base),
        adapter=answer(adapter),
    )


def _score(
    name: tuple[str, str | None],
    group: Sequence[ProbeOutcome],
    pair: tuple[int, int],
    p_value: float,
    adjusted: float,
) -> ProbeScore:
    sides: dict[str, Any] = {}
    for side in ("base", "adapter"):
        answers: list[ProbeAnswer] = [getattr(outcome, side) for outcome in group]
        passed = sum(answer.passed for answer in answers)
        sides[side] = passed / len(group)
        sides[f"{side}_passed"] = passed
        sides[f"{side}_interval"] = wilson_interval(passed, len(group))
        sides[f"{side}_unfinished"] = sum(not answer.finished for answer in answers)
        sides[f"{side}_empty"] = sum(not answer.text.strip() for answer in answers)
    gained, lost = pair
    return ProbeScore(
        probe_class=name[0],
        tier=name[1],
        probes=len(group),
        gained=gained,
        lost=lost,
        p_value=p_value,
        p_adjusted=adjusted,
        verdict=find(gained, lost, adjusted),
        **sides,
    )
