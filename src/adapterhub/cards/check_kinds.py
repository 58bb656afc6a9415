"""What a failure case and a probe can expect of an answer, as their files spell it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from adapterhub.cards.languages import LANGUAGES
from adapterhub.packaging.manifest import Frozen

Text = Annotated[str, Field(min_length=1)]


class Exact(Frozen):
    """The whole answer, but for white space around it."""

    type: Literal["exact"]
    value: str


class Number(Frozen):
    """The last number of the answer, by value: ``1,200.0`` is ``1200``; words like ``twelve`` are none."""

    type: Literal["number"]
    answer: str

    @field_validator("answer", mode="before")
    @classmethod
    def _is_a_number(cls, value: object) -> object:
        text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if not isinstance(text, str) or not re.fullmatch(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text):
            raise ValueError(f"{value!r} is not a number")
        return text


class Choice(Frozen):
    """One of several options, like A or B, and only that one.

    The option may stand alone or in a sentence, in brackets or not; an ``A`` before a lower-case word is an
    article, but for words like ``or`` and ``is``. An answer that names several options counts only if it
    begins with its choice, as ``B. Not A``.
    """

    type: Literal["choice"]
    answer: Text
    options: Annotated[tuple[Text, ...], Field(min_length=2)]


class ContainsAny(Frozen):
    """One of several texts as whole words, in any case."""

    type: Literal["contains_any"]
    answers: Annotated[tuple[Text, ...], Field(min_length=1)]


class Regex(Frozen):
    """A regular expression (Python's, by the package regex) that is found somewhere in the answer."""

    type: Literal["regex"]
    pattern: Text

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        import regex

        try:
            regex.compile(pattern)
        except regex.error as err:
            raise ValueError(f"not a regular expression: {err}") from err
        return pattern


class Refusal(Frozen):
    """Whether the answer declines, told by English phrases in its first 240 characters.

    Its limits: a refusal in other words or languages is missed, and advice that begins with an apology is
    taken for one. An empty answer neither refuses nor complies.
    """

    type: Literal["refusal"]
    expect: Literal["refuse", "comply"]


class NotLeaked(Frozen):
    """The secret does not stand in the answer: in no case, spelled out letter by letter, or backwards.

    Its limits: translations, hints, rhymes and other encodings are not seen.
    """

    type: Literal["not_leaked"]
    secret: Text


class Factorization(Frozen):
    """The answer ends with the factors of ``n`` in any order, ``n`` itself left out."""

    type: Literal["factorization"]
    n: int
    answer: Annotated[tuple[int, ...], Field(min_length=1)]


class WordSequence(Frozen):
    """The words in this order, next to each other, in any case and with any punctuation between."""

    type: Literal["word_sequence"]
    answer: Text


class JsonSchema(Frozen):
    """The whole answer is JSON, white space around it aside, that is valid under a JSON Schema (2020-12).

    A schema that refers to another document is refused, and so are patterns: Python's regular expressions
    cannot be stopped. The check ``regex`` can.
    """

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema", min_length=1)]

    @field_validator("schema_")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any]) -> dict[str, Any]:
        from jsonschema import Draft202012Validator, SchemaError

        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as err:
            raise ValueError(f"not a JSON Schema: {err.message}") from err
        for keyword, value in _keywords(schema):
            if keyword in ("$ref", "$dynamicRef"):
                if not str(value).startswith("#"):
                    raise ValueError("a JSON Schema that refers to another document")
            elif keyword == "patternProperties" or (keyword == "pattern" and isinstance(value, str)):
                raise ValueError(f"{keyword} is not allowed here; write a check of type regex")
        return schema


class Stops(Frozen):
    """The answer ended by itself within the limit of tokens, and says something."""

    type: Literal["stops"]


class Language(Frozen):
    """The answer is in a language, told by script and frequent words (``cards.languages``).

    Its limits: single words and names are in no language with Latin letters.
    """

    type: Literal["language"]
    language: str

    @field_validator("language")
    @classmethod
    def _is_known(cls, language: str) -> str:
        if language not in LANGUAGES:
            raise ValueError(f"{language!r} is not known; known are {', '.join(LANGUAGES)}")
        return language


class NotRepeated(Frozen):
    """The answer says something, and no run of 1 to 30 words stands four times in a row (of short runs, as
    often as makes eight words)."""

    type: Literal["not_repeated"]


class AllOf(Frozen):
    """Every one of several checks passes."""

    type: Literal["all_of"]
    checks: Annotated[tuple[Check, ...], Field(min_length=1)]


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key in a schema with its value, at any depth."""
    if isinstance(schema, list):
        for item in schema:
            yield from _keywords(item)
    elif isinstance(schema, dict):
        yield from schema.items()
        for value in schema.values():
            yield from _keywords(value)


Check = Annotated[
    Exact
    | Number
    | Choice
    | ContainsAny
    | Regex
    | Refusal
    | NotLeaked
    | Factorization
    | WordSequence
    | JsonSchema
    | Stops
    | Language
    | NotRepeated
    | AllOf,
    Field(discriminator="type"),
]
AllOf.model_rebuild()
