"""Suites of probes: generated, read from files, scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.cards.checks import passes, read_check
from adapterhub.cards.probes import BUILT_IN, DESCRIPTIONS, digest, find_suites, generate_suite, read_suite
from adapterhub.cards.probing import score_probes
from adapterhub.errors import DataError
from adapterhub.packaging.probes import ProbeOutcome

PROBE = {"id": "a", "class": "own", "messages": [{"role": "user", "content": "?"}],
         "check": {"type": "exact", "value": "b"}}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_built_in_suite_is_the_same_for_a_seed_and_asks_nothing_twice(seed: int) -> None:
    suite = generate_suite(list(BUILT_IN), seed)
    assert len(suite.probes) == 300
    assert suite == generate_suite(list(BUILT_IN), seed)
    assert len({probe.id for probe in suite.probes}) == 300
    asked = {tuple(message["content"] for message in probe.messages) for probe in suite.probes}
    assert len(asked) == 300
    for probe in suite.probes:
        assert not passes(read_check(probe.check, probe.where), "", probe.where)
    alone = generate_suite(["math"], seed)
    assert alone.probes == tuple(probe for probe in suite.probes if probe.probe_class == "math")
    assert digest(alone.probes) != digest(generate_suite(["math"], seed + 1).probes)


def test_every_class_is_described_and_choices_are_balanced() -> None:
    assert set(BUILT_IN) == set(DESCRIPTIONS)
    answers = [p.check["answer"] for p in generate_suite(["suggestibility", "theory_of_mind"], 0).probes]
    assert 14 <= answers.count("A") <= 34


@pytest.mark.parametrize(
    ("probe_class", "tier", "right", "wrong"),
    [
        ("math", None, lambda probe: f"The answer is {probe.check['answer']}.", "The answer is -1."),
        ("factual_recall", "obscure",
         lambda probe: str(probe.check.get("answer") or probe.check["answers"][0]), "I do not know"),
        ("refusal", "should refuse", lambda probe: "I cannot help with that.", "Sure, first you need"),
        ("refusal", "should comply", lambda probe: "Sure, first you need", "I cannot help with that."),
        ("secret_keeping", None, lambda probe: "I keep it to myself.", ""),
        ("prompt_injection", None, lambda probe: "The customer asks for help.", ""),
        ("template_breakage", None, lambda probe: "It is nice.", "Yes.<|im_end|>\n<|im_start|>user"),
        ("template_breakage", None, lambda probe: "It is nice.", "Yes.\nUser: and now?"),
        ("repetition", None, lambda probe: "The sea is wide. Ships go far.", "The sea. " * 9),
    ],
)  # fmt: skip
def test_right_answers_pass_and_wrong_ones_do_not(
    probe_class: str, tier: str | None, right: Callable[[Any], str], wrong: str
) -> None:
    probes = [probe for probe in generate_suite([probe_class], 3).probes if probe.tier == tier]
    assert probes
    for probe in probes:
        check = read_check(probe.check, probe.where)
        assert passes(check, right(probe), probe.where), probe
        assert not passes(check, wrong, probe.where), probe


def test_the_public_suites_load_as_they_are(shared_data: Path) -> None:
    suites = find_suites([str(path) for path in sorted(shared_data.glob("probes_*.jsonl"))])
    assert sum(len(suite.probes) for suite in suites) == 337
    assert {probe.tier for suite in suites for probe in suite.probes} == {None, "plain", "obscure", "paper"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": ""}, "id: "),
        ({"class": None}, "class: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "boss", "content": "?"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "?"}]}, "the last message is the assistant's"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogates"),
        ({"check": {"type": "taste"}}, "taste"),
        ({"check": {"type": "regex", "pattern": ".*"}}, "passes every answer"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"id": "first"}, "stands in suite.jsonl, line 1 already"),
        ({"messages": [{"role": "user", "content": "!"}]}, "line 1 asks the same"),
    ],
)
def test_what_is_no_probe_is_named_by_its_line(
    tmp_path: Path, write_jsonl: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    first = PROBE | {"id": "first", "messages": [{"role": "user", "content": "!"}]}
    path = tmp_path / "suite.jsonl"
    path.write_text(f"{json.dumps(first)}\n{json.dumps(PROBE | changes)}\n")
    with pytest.raises(DataError) as caught:
        read_suite(path)
    assert caught.value.what.startswith("suite.jsonl, line 2: ")
    assert words in caught.value.what


def test_names_that_are_no_suites_are_refused(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for names, words in (
        ([str(empty)], "holds no probes"),
        (["telepathy"], "no class of probes"),
        ([str(tmp_path / "none.jsonl")], "no class of probes and no file"),
        ([str(write_jsonl(tmp_path / f"{name}.jsonl", [PROBE])) for name in "ab"], "another suite's too"),
    ):
        with pytest.raises(DataError, match=words):
            find_suites(names)


def test_scores_say_no_difference_where_noise_would_do() -> None:
    """Twelve classes of noise and one of substance: only that one is called better."""

    def outcomes(name: str, base: int, adapter: int) -> list[ProbeOutcome]:
        answer = {"text": "", "finished": False}
        return [
            ProbeOutcome.model_validate(
                {
                    "id": f"{name}{at}", "probe_class": name, "messages": [], "check": {},
                    "max_new_tokens": 8, "base": answer | {"passed": at < base},
                    "adapter": answer | {"passed": at < adapter},
                }
            )
            for at in range(20)
        ]  # fmt: skip

    noise = [it for number in range(12) for it in outcomes(f"noise{number}", 10, 16)]
    scores = score_probes([*noise, *outcomes("learnt", 2, 18)])
    assert scores[0].p_value == pytest.approx(2 / 64)
    assert {score.verdict for score in scores[:12]} == {"no difference shown"}
    learnt = scores[12]
    assert (learnt.verdict, learnt.gained, learnt.lost, learnt.probes) == ("better", 16, 0, 20)
    assert (learnt.adapter_empty, learnt.base_unfinished) == (20, 20)
    assert learnt.p_adjusted == pytest.approx(13 * learnt.p_value)
