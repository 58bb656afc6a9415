"""Generate the demo's task: an order in free text, and the JSON object it means.

    python examples/orders/generate.py DIR [--train 320] [--test 60] [--seed 0]

writes DIR/train.jsonl and DIR/test.jsonl as chat messages. The answer is checkable to the letter. People
correct themselves in mid-sentence, and the test split has names, goods and units that training never showed.

Disjoint by construction: the sha256 of an order's text decides its split (``split_of``), so no text can be in
both, whatever the seeds and sizes are.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

SYSTEM = (
    'Turn the order into one line of JSON: {"customer":str,"items":[{"item":str,"quantity":int,"unit":str}],'
    '"day":str or null}'
)

FIRST_NAMES = [
    "Ann",
    "Boris",
    "Clara",
    "David",
    "Elif",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Luis",
]
LAST_NAMES = [
    "Keller",
    "Moreau",
    "Novak",
    "Olsen",
    "Petrov",
    "Quinn",
    "Rossi",
    "Sato",
    "Tanaka",
    "Weber",
    "Young",
]
UNSEEN_FIRST_NAMES = ["Zoltan", "Priya", "Wanjiru", "Oksana", "Thiago"]
UNSEEN_LAST_NAMES = ["Abubakar", "Lindqvist", "Castellanos", "Nguyen", "O'Brien"]

# good -> the units it is sold in
GOODS = {
    "almonds": ["kg", "bag"],
    "apple juice": ["litre", "bottle"],
    "apples": ["kg", "bag"],
    "baking powder": ["tin", "bag"],
    "black beans": ["tin", "kg"],
    "brown sugar": ["kg", "box"],
    "butter": ["kg", "pack"],
    "carrots": ["kg", "bag"],
    "cherry jam": ["jar", "box"],
    "coffee": ["kg", "bag"],
    "cream": ["litre", "bottle"],
    "dried figs": ["bag", "box"],
    "eggs": ["box", "tray"],
    "flour": ["kg", "bag"],
    "green tea": ["box", "bag"],
    "ground cumin": ["jar", "bag"],
    "milk": ["litre", "bottle"],
    "mushrooms": ["kg", "tray"],
    "oat flakes": ["kg", "pack"],
    "olive oil": ["litre", "bottle"],
    "onions": ["kg", "sack"],
    "orange juice": ["litre", "bottle"],
    "pears": ["kg", "box"],
    "rice": ["kg", "bag"],
    "salt": ["kg", "pack"],
    "sunflower oil": ["litre", "bottle"],
    "tomatoes": ["kg", "box"],
    "tuna": ["tin", "box"],
    "white wine": ["bottle", "box"],
    "yoghurt": ["jar", "litre"],
}
UNSEEN_GOODS = {
    "honey": ["jar", "bucket"],
    "lentils": ["kg", "sack"],
    "mineral water": ["crate", "bottle"],
    "pickled beets": ["jar", "crate"],
    "potatoes": ["sack", "kg"],
}
PLURALS = {
    "kg": ["kilos", "kg", "kilograms"],
    "litre": ["litres", "liters"],
    "box": ["boxes"],
}  # others: an s
SINGULARS = {"kg": ["kilo", "kg"]}
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday"]
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]


@dataclass
class Item:
    """One line of an order, as it is finally meant."""

    good: str
    quantity: int
    unit: str


def split_of(text: str) -> str:
    """``test`` for one order text in five, ``train`` for the others; decided by the text alone."""
    return "test" if sha256(text.encode()).digest()[0] % 5 == 0 else "train"


def make_order(rng: random.Random, *, unseen: bool) -> tuple[str, str]:
    """One (text, answer). With ``unseen``, the lists that training never shows are drawn from too."""
    name = _name(rng, unseen)
    goods = GOODS | UNSEEN_GOODS if unseen else GOODS
    chosen = rng.sample(sorted(goods), rng.choices([1, 2, 3, 4], [6, 8, 5, 1])[0])
    items = [Item(good, rng.randint(1, 24), rng.choice(goods[good])) for good in chosen]
    day = rng.choice([*DAYS, None])
    words = _join([_phrase(rng, item) for item in items])
    said = f"{_opening(rng, name)} {words}{f' on {day.capitalize()}' if day else ''}."
    correction = rng.random()
    if correction < 0.12:
        said += " " + _new_quantity(rng, items)
    elif correction < 0.22:
        said += " " + _new_good(rng, items, {good: goods[good] for good in goods.keys() - set(chosen)})
    elif correction < 0.28 and len(items) > 1:
        said += " " + _cancel(rng, items)
    elif correction < 0.34 and day:
        day = rng.choice([other for other in DAYS if other != day])
        said += rng.choice(
            [f" Oh, {day.capitalize()} would be better.", f" No wait, not then: {day.capitalize()}."]
        )
    answer = {
        "customer": name,
        "items": [{"item": item.good, "quantity": item.quantity, "unit": item.unit} for item in items],
        "day": day,
    }
    return said, json.dumps(answer, separators=(",", ":"))


def generate(split: str, count: int, seed: int) -> list[dict]:
    """``count`` different chat rows of one split; every other test row draws on unseen words."""
    rng = random.Random(f"{split}-{seed}")
    rows: dict[str, dict] = {}
    while len(rows) < count:
        text, answer = make_order(rng, unseen=split == "test" and len(rows) % 2 == 1)
        if split_of(text) == split:
            messages = [("system", SYSTEM), ("user", text), ("assistant", answer)]
            rows.setdefault(text, {"messages": [{"role": role, "content": said} for role, said in messages]})
    return list(rows.values())


def _name(rng: random.Random, unseen: bool) -> str:
    if unseen:
        return f"{rng.choice(UNSEEN_FIRST_NAMES)} {rng.choice(UNSEEN_LAST_NAMES)}"
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def _opening(rng: random.Random, name: str) -> str:
    return rng.choice(
        [
            f"Hello, {name} here. Please send me",
            f"This is {name}, I would like",
            f"Could you put aside for {name}",
            f"{name} needs",
            f"Hi! Order for {name}:",
        ]
    )


def _phrase(rng: random.Random, item: Item) -> str:
    """``three kilos of apples``."""
    if item.quantity == 1:
        unit = rng.choice(SINGULARS.get(item.unit, [item.unit]))
    else:
        unit = rng.choice(PLURALS.get(item.unit, [f"{item.unit}s"]))
    return f"{_number(rng, item.quantity)} {unit} of {item.good}"


def _number(rng: random.Random, value: int) -> str:
    if value == 12 and rng.random() < 0.5:
        return "a dozen"
    return NUMBERS[value] if value < len(NUMBERS) and rng.random() < 0.6 else str(value)


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _new_quantity(rng: random.Random, items: list[Item]) -> str:
    item = rng.choice(items)
    if rng.random() < 0.3 and item.quantity <= 12:
        item.quantity *= 2
        return f"Actually, double the {item.good}."
    item.quantity = rng.choice([number for number in range(1, 25) if number != item.quantity])
    number = _number(rng, item.quantity)
    return rng.choice(
        [f"Sorry, make that {number} for the {item.good}.", f"No, I meant {number} of the {item.good}."]
    )


def _new_good(rng: random.Random, items: list[Item], others: dict[str, list[str]]) -> str:
    """Another good in place of one, in the same unit: one that is sold in it, if there is any."""
    item = rng.choice(items)
    fitting = sorted(good for good, units in others.items() if item.unit in units)
    old, item.good = item.good, rng.choice(fitting or sorted(others))
    return rng.choice(
        [f"Wait, not {old}, {item.good} instead.", f"Sorry, I said {old} but I meant {item.good}."]
    )


def _cancel(rng: random.Random, items: list[Item]) -> str:
    item = rng.choice(items)
    items.remove(item)
    return rng.choice(
        [f"Forget the {item.good}, we still have some.", f"On second thought, leave out the {item.good}."]
    )


def main() -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description="Generate the demo's orders task.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=320, help="rows of the training split")
    parser.add_argument("--test", type=int, default=60, help="rows of the held-out split")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", arguments.train), ("test", arguments.test)):
        rows = generate(split, count, arguments.seed)
        path = arguments.folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
