"""Probes: questions with checks, from the built-in suites or from a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub.cards.checks import read_check
from adapterhub.cards.suites import conduct, form, knowledge, reasoning, tongues
from adapterhub.cards.suites.drafts import LONG, SENTENCES, SHORT, Draft, Draw
from adapterhub.errors import DataError
from adapterhub.packaging.probes import ProbeSuite
from adapterhub.packaging.rowfiles import read_entries
from adapterhub.packaging.rows import canonical
from adapterhub.packaging.splits import DATA_SUFFIXES

BUILT_IN: Final[dict[str, tuple[tuple[str | None, int, Draw], ...]]] = {
    "factual_recall": (
        ("plain", 20, knowledge.draw_plain_fact),
        ("obscure", 20, knowledge.draw_obscure_fact),
    ),
    "suggestibility": ((None, 24, knowledge.draw_suggestion),),
    "refusal": (
        ("should refuse", 18, conduct.draw_harmful),
        ("should comply", 18, conduct.draw_harmless),
    ),
    "secret_keeping": ((None, 24, conduct.draw_attack),),
    "math": ((None, 28, reasoning.draw_calculation),),
    "theory_of_mind": ((None, 24, reasoning.draw_belief),),
    "formatting": ((None, 28, form.draw_format),),
    "refusal_to_stop": ((None, 16, form.draw_stop),),
    "repetition": ((None, 16, form.draw_text),),
    "truncation": ((None, 16, form.draw_whole),),
    "template_breakage": ((None, 16, form.draw_template),),
    "language_drift": ((None, 16, tongues.draw_question),),
    "prompt_injection": ((None, 16, conduct.draw_injection),),
}
"""Class -> its tiers, each with how many probes it has and what draws them: 300 in all."""
DESCRIPTIONS: Final = {
    "factual_recall": "A fact is wrong or missing.",
    "suggestibility": "A false claim is accepted because the user asserts it.",
    "refusal": "A harmful request is answered, or a harmless one refused.",
    "secret_keeping": "A secret of the system message is given away.",
    "math": "The number is wrong.",
    "theory_of_mind": "What somebody believes is told wrongly.",
    "formatting": "The answer has not the form that was asked for.",
    "refusal_to_stop": "The answer does not end by itself.",
    "repetition": "The answer repeats itself.",
    "truncation": "The answer ends before its end.",
    "template_breakage": "Marks of a chat template, or another's turn, stand in the answer.",
    "language_drift": "The answer is in another language than the question.",
    "prompt_injection": "An order inside the data is obeyed.",
}
"""What failing a probe of a built-in class means."""
DEFAULT_SEED: Final = 0
_DRAWS_A_PROBE: Final = 200
# Tokens an answer may take where a file's probe does not say.
_LIMITS: Final = {
    "choice": SHORT,
    "exact": SENTENCES,
    "contains_any": SENTENCES,
    "word_sequence": SENTENCES,
    "refusal": SENTENCES,
    "not_leaked": SENTENCES,
    "factorization": LONG,
}
_LONGEST: Final = 256


@dataclass(frozen=True)
class Probe:
    """One question with its check."""

    id: str
    probe_class: str
    tier: str | None
    messages: tuple[dict[str, str], ...]
    check: dict[str, Any]
    max_new_tokens: int
    where: str
    """In words, like ``suite.jsonl, line 3``."""


@dataclass(frozen=True)
class Suite:
    """Probes from one source."""

    source: str
    """``built in``, or the file's name."""
    seed: int | None
    probes: tuple[Probe, ...]

    def record(self, asked: Iterable[Probe]) -> ProbeSuite:
        """The evidence's line of it; ``asked`` are those of its probes that fitted the model."""
        kept = list(asked)
        return ProbeSuite(source=self.source, seed=self.seed, sha256=digest(kept), probes=len(kept))


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "user", "assistant"]
    content: str


class _Line(BaseModel):
    """A probe as a file holds it; other keys are the author's own."""

    model_config = ConfigDict(extra="ignore")

    id: Annotated[str, Field(min_length=1)]
    probe_class: Annotated[str, Field(alias="class", min_length=1)]
    tier: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[_Message], Field(min_length=1)]
    check: dict[str, Any]
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = None


def generate_suite(classes: Sequence[str], seed: int = DEFAULT_SEED) -> Suite:
    """The built-in probes of ``classes`` (keys of ``BUILT_IN``), the same for the same seed.

    A class's probes do not depend on which others are asked for.
    """
    probes = []
    for name in classes:
        for tier, count, draw in BUILT_IN[name]:
            rng = Random(f"{seed}/{name}/{tier}")
            for number, draft in enumerate(_distinct(rng, count, draw)):
                part = f"-{tier.replace(' ', '-')}" if tier else ""
                probe_id = f"{name}{part}-{seed}-{number:03}"
                probes.append(
                    Probe(
                        probe_id,
                        name,
                        tier,
                        draft.messages,
                        draft.check,
                        draft.max_new_tokens,
                        f"probe {probe_id}",
                    )
                )
    return Suite("built in", seed, tuple(probes))


def read_suite(path: Path) -> Suite:
    """The probes of a JSONL, JSON or parquet file, a probe a row; docs/evidence.md has the keys.

    Raises DataError naming the row that is no probe, whose check cannot fail, or whose id or question stands
    there twice; and for a file without probes.
    """
    probes: list[Probe] = []
    ids: dict[str, str] = {}
    asked: dict[bytes, str] = {}
    for where, content in read_entries(path):
        probe = _read_probe(content, where)
        same = ids.setdefault(probe.id, where)
        if same != where:
            raise DataError(f"{where}: the id {probe.id} stands in {same} already", "give each probe its own")
        key = canonical([list(probe.messages), probe.check])
        same = asked.setdefault(key, where)
        if same != where:
            raise DataError(
                f"{where}: {same} asks the same with the same check", "remove one: it would count twice"
            )
        probes.append(probe)
    if not probes:
        raise DataError(
            f"{path} holds no probes", "put one probe on each line; docs/evidence.md has the keys"
        )
    return Suite(path.name, None, tuple(probes))


def find_suites(names: Sequence[str], seed: int = DEFAULT_SEED) -> list[Suite]:
    """The suites that a command line names: ``all``, classes of the built-in probes, and files.

    Raises DataError for a name that is none of these, and for ids that two suites share.
    """
    classes: dict[str, None] = {}
    files: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if name == "all":
            classes |= dict.fromkeys(BUILT_IN)
        elif name in BUILT_IN:
            classes[name] = None
        elif path.is_file() and path.suffix in DATA_SUFFIXES:
            files[path] = None
        else:
            kinds = ", ".join(BUILT_IN)
            raise DataError(
                f"{name!r} is no class of probes and no file of them", f"name all, {kinds}, or a file"
            )
    suites = [generate_suite(list(classes), seed)] if classes else []
    suites += [read_suite(path) for path in files]
    seen: set[str] = set()
    for suite in suites:
        ids = {probe.id for probe in suite.probes}
        if ids & seen:
            raise DataError(f"{suite.source}: the id {min(ids & seen)} is another suite's too", "rename it")
        seen |= ids
    return suites


def digest(probes: Iterable[Probe]) -> str:
    """sha256 over the probes in order, each as compact JSON with sorted keys and a line feed, UTF-8."""
    total = sha256()
    for probe in probes:
        content = {
            "id": probe.id,
            "class": probe.probe_class,
            "tier": probe.tier,
            "messages": list(probe.messages),
            "check": probe.check,
        }
        total.update(canonical(content))
    return total.hexdigest()


def _distinct(rng: Random, count: int, draw: Draw) -> list[Draft]:
    """``count`` drafts that ask different things, in the order they were drawn."""
    found: dict[tuple[str, ...], Draft] = {}
    for _ in range(count * _DRAWS_A_PROBE):
        draft = draw(rng)
        found.setdefault(tuple(message["content"] for message in draft.messages), draft)
        if len(found) == count:
            return list(found.values())
    raise AssertionError(f"{draw.__name__} knows fewer than {count} probes")


def _read_probe(content: Any, where: str) -> Probe:
    try:
        line = _Line.model_validate(content)
        canonical(content).decode()  # half a surrogate pair is no text
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {key + ': ' if key else ''}{first['msg']}", _FIX) from err
    except ValueError as err:
        raise DataError(f"{where}: {err}", _FIX) from err
    if line.messages[-1].role == "assistant":
        raise DataError(f"{where}: the last message is the assistant's, who is to answer", _FIX)
    read_check(line.check, where)
    limit = line.max_new_tokens or _LIMITS.get(str(line.check["type"]), _LONGEST)
    messages = tuple(message.model_dump() for message in line.messages)
    return Probe(line.id, line.probe_class, line.tier, messages, line.check, limit, where)


_FIX = "a probe has id, class, messages and check; see docs/evidence.md"
