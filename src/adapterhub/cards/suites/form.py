"""Probes of form: formats that were asked for, and answers that end, run straight and are whole."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from adapterhub.cards.suites import tables
from adapterhub.cards.suites.drafts import (
    LONG,
    SAYS_SOMETHING,
    SENTENCES,
    SHORT,
    Draft,
    Message,
    all_of,
    ask,
)

_STOPS = {"type": "stops"}
_MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
]  # fmt: skip
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
# Marks of the templates in use: whoever writes them, or speaks for the user, has left its own turn.
_MARKS = (
    r"<\|[a-z_]+\|>|<\uff5c[^\uff5c>]+\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>"
    r"|^\s*#{2,} ?(?:Human|User|Instruction|Assistant|Response)\b"
    r"|^\s*(?:Human|User|Assistant) ?:"
)
_NO_MARKS = {"type": "regex", "pattern": rf"(?ms)\A(?!.*(?:{_MARKS}))"}
_SHORT_TASKS = (
    "Say hello to {person} in one short sentence.",
    "Answer with one word: what colour is fresh snow?",
    "Thank {person} for the {goods} in one sentence.",
    "Is {number} an even number? Answer with yes or no.",
    "Name one thing that has to do with {topic}. One word only.",
    "Write one short sentence about {topic}.",
    "Wish {person} a happy birthday in one sentence.",
)
_TEXTS = (
    "Write a paragraph of about sixty words about {topic}.",
    "Tell a very short story about {topic}.",
    "Explain to a child what {topic} can teach us, in three sentences.",
    "Name ten different {kind}, one a line.",
    "List eight different {kind}, separated by commas.",
)
_ODD_PROMPTS = (
    "What does the tag <b> do in HTML? One sentence.",
    "User: hi\nAssistant: hello\n\nHow many people speak in the lines above? One sentence.",
    "  \n\nPlease say in one sentence what {topic} is like.\n\n   ",
    "### Note\n{person} bought {number} {goods}.\n### End\nWho bought something? One sentence.",
    "[note] {person} likes {topic}. [/note] What does {person} like? One sentence.",
    "{{{{ {topic} }}}} {{% end %}} Say in one sentence what stands in the braces.",
)
_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Today is Monday. The user is called {person}.",
    "Rules:\n- be short\n- be polite\n\nUser: and Assistant: are words like any others.",
)


def draw_format(rng: Random) -> Draft:
    """An answer in a form that a program would read."""
    draw = rng.choice((_json_object, _json_object, _json_list, _yes_or_no, _capitals, _list, _numbered))
    return draw(rng)


def draw_stop(rng: Random) -> Draft:
    """A short task, after which the answer must end by itself."""
    return ask(_fill(rng, rng.choice(_SHORT_TASKS)), _STOPS, SENTENCES)


def draw_text(rng: Random) -> Draft:
    """A longer text or a list, which must not go in circles."""
    return ask(_fill(rng, rng.choice(_TEXTS)), {"type": "not_repeated"}, LONG)


def draw_whole(rng: Random) -> Draft:
    """Something with a known end, which must be reached: counting, months, a text said after another."""
    kind = rng.choice(("up", "up", "down", "names", "names", "copy"))
    if kind == "names":
        names, series = rng.choice(
            (
                (_MONTHS, "twelve months of the year"),
                (_WEEKDAYS, "seven days of the week, from Monday"),
                (_PLANETS, "eight planets, from the Sun outwards"),
            )
        )
        how = rng.choice(("separated by commas", "one a line", "as a numbered list"))
        return ask(f"Name the {series}, {how}.", _in_order(names), LONG)
    if kind == "copy":
        people = rng.sample(tables.PEOPLE, 9)
        return ask(f"Repeat this list exactly: {', '.join(people)}", _in_order(people), LONG)
    first, last = rng.randint(1, 9), rng.randint(15, 24)
    numbers = list(range(first, last + 1))
    if kind == "down":
        numbers.reverse()
    text = f"Count from {numbers[0]} {kind} to {numbers[-1]} in digits, separated by commas."
    return ask(text, _in_order([str(number) for number in numbers]), LONG)


def draw_template(rng: Random) -> Draft:
    """Several turns, system messages and text that looks like a template: no mark of one may be answered."""
    messages: list[Message] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": _fill(rng, rng.choice(_SYSTEMS))})
    for _ in range(rng.choice((0, 1, 2))):
        person = rng.choice(tables.PEOPLE)
        messages.append({"role": "user", "content": f"My friend is called {person}."})
        messages.append({"role": "assistant", "content": f"Nice to know. Say hello to {person} from me."})
    messages.append({"role": "user", "content": _fill(rng, rng.choice(_ODD_PROMPTS))})
    return Draft(tuple(messages), all_of(_NO_MARKS, SAYS_SOMETHING), SENTENCES)


def _fill(rng: Random, template: str) -> str:
    return template.format(
        person=rng.choice(tables.PEOPLE),
        goods=rng.choice(tables.GOODS),
        topic=rng.choice(tables.TOPICS),
        kind=rng.choice(tables.KINDS),
        number=rng.randint(2, 99),
    )


def _in_order(words: list[str]) -> dict[str, Any]:
    """All words stand in the answer, in this order, whatever stands between."""
    pattern = ".*?".join(rf"\b{word}\b" for word in words)
    return {"type": "regex", "pattern": f"(?s){pattern}"}


def _json_object(rng: Random) -> Draft:
    person, goods, number = rng.choice(tables.PEOPLE), rng.choice(tables.GOODS), rng.randint(2, 40)
    wanted = {"name": person, "goods": goods, "count": number}
    schema = {
        "type": "object",
        "properties": {key: {"const": value} for key, value in wanted.items()},
        "required": list(wanted),
        "additionalProperties": False,
    }
    keys = json.dumps({"name": "...", "goods": "...", "count": 0})
    text = f"{person} ordered {number} {goods}. Answer with one line of JSON like {keys} and nothing else."
    return ask(text, {"type": "json_schema", "schema": schema}, SENTENCES)


def _json_list(rng: Random) -> Draft:
    count = rng.randint(2, 5)
    schema = {
        "type": "array",
        "items": {"type": "string", "minLength": 1},
        "minItems": count,
        "maxItems": count,
        "uniqueItems": True,
    }
    text = f"Answer with a JSON list of exactly {count} {rng.choice(tables.KINDS)} as strings, nothing else."
    return ask(text, {"type": "json_schema", "schema": schema}, SENTENCES)


def _yes_or_no(rng: Random) -> Draft:
    a, b = rng.sample(range(2, 99), 2)
    answer = "yes" if a > b else "no"
    text = f"Is {a} greater than {b}? Answer with exactly yes or no, in lower case, without a full stop."
    return ask(text, {"type": "exact", "value": answer}, SHORT)


def _capitals(rng: Random) -> Draft:
    word = rng.choice(tables.SECRETS)
    text = f"Write the word {word} in capital letters. Answer with that word only."
    return ask(text, {"type": "exact", "value": word.upper()}, SHORT)


def _list(rng: Random) -> Draft:
    count = rng.randint(3, 5)
    text = f"Name exactly {count} {rng.choice(tables.KINDS)}, separated by commas, on one line, nothing else."
    return ask(
        text, {"type": "regex", "pattern": rf"\A\s*[^,\n]+(?:,[^,\n]+){{{count - 1}}}\s*\Z"}, SENTENCES
    )


def _numbered(rng: Random) -> Draft:
    count = rng.randint(2, 4)
    lines = r"\s*\n\s*".join(rf"{number}\. [^\n]+" for number in range(1, count + 1))
    text = (
        f"List exactly {count} {rng.choice(tables.KINDS)}, one a line, numbered like '1. ...', nothing else."
    )
    return ask(text, {"type": "regex", "pattern": rf"\A\s*{lines}\s*\Z"}, SENTENCES)
