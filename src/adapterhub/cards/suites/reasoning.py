"""Probes of reckoning and of what others believe."""

from __future__ import annotations

from random import Random

from adapterhub.cards.suites import tables
from adapterhub.cards.suites.drafts import SHORT, Draft, ask, choose

_ONLY = "Answer with the number in digits only."


def draw_calculation(rng: Random) -> Draft:
    """One or two steps of arithmetic, bare or in words."""
    draw = rng.choice((_sum, _product, _share, _two_steps, _percentage, _missing))
    question, answer = draw(rng)
    return ask(f"{question} {_ONLY}", {"type": "number", "answer": str(answer)}, SHORT)


def draw_belief(rng: Random) -> Draft:
    """Where somebody will look for a thing that was moved: unseen (Sally and Anne), or before their eyes."""
    first, second = rng.sample(tables.PEOPLE, 2)
    here, there = rng.sample(tables.PLACES, 2)
    thing = rng.choice(tables.THINGS)
    sees = rng.random() < 0.5
    story = f"{first} puts the {thing} into the {here}."
    if sees:
        story += f" {second} takes the {thing} out and puts it into the {there} while {first} is watching."
        story += f" Then {first} goes out."
    else:
        story += f" Then {first} goes out. While {first} is away, {second} takes the {thing} out and puts it"
        story += f" into the {there}. {first} does not notice."
    question = rng.choice(
        (
            f"{first} comes back. Where will {first} look for the {thing} first?",
            f"Where does {first} believe the {thing} to be?",
        )
    )
    right, wrong = (there, here) if sees else (here, there)
    return choose(rng, f"{story} {question}", f"In the {right}", f"In the {wrong}")


def _sum(rng: Random) -> tuple[str, int]:
    a, b = rng.randint(12, 99), rng.randint(12, 99)
    if rng.random() < 0.5:
        return f"What is {a} + {b}?", a + b
    return f"What is {a + b} - {b}?", a


def _product(rng: Random) -> tuple[str, int]:
    a, b = rng.randint(3, 12), rng.randint(6, 19)
    return f"What is {a} times {b}?", a * b


def _share(rng: Random) -> tuple[str, int]:
    children, each = rng.randint(3, 9), rng.randint(3, 12)
    goods = rng.choice(tables.GOODS)
    question = f"{children * each} {goods} are shared equally among {children} children."
    return f"{question} How many {goods} does each child get?", each


def _two_steps(rng: Random) -> tuple[str, int]:
    name, goods = rng.choice(tables.PEOPLE), rng.choice(tables.GOODS)
    had, bought, given = rng.randint(10, 40), rng.randint(5, 30), rng.randint(2, 9)
    question = f"{name} has {had} {goods}, buys {bought} more and gives {given} away."
    return f"{question} How many {goods} does {name} have now?", had + bought - given


def _percentage(rng: Random) -> tuple[str, int]:
    per_cent, hundreds = rng.choice((5, 10, 20, 25, 50, 75)), rng.randint(2, 12)
    return f"What is {per_cent} percent of {hundreds * 100}?", per_cent * hundreds


def _missing(rng: Random) -> tuple[str, int]:
    number, added = rng.randint(4, 40), rng.randint(5, 40)
    return f"A number plus {added} is {number + added}. What is the number?", number
