"""The options that say which adapters are merged together, and how."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from adapterhub.commands.targets import find_folder
from adapterhub.errors import RecipeError

if TYPE_CHECKING:
    from adapterhub.packaging.combination import Combine
    from adapterhub.packaging.merge import Combination

Command = Callable[..., Any]


def combining_options(command: Command) -> Command:
    """``--with``, ``--weight``, ``--combine``, ``--density`` and ``--seed``, for ``read_combination``."""
    options = (
        click.option(
            "--with",
            "others",
            multiple=True,
            metavar="ADAPTER=WEIGHT",
            help="Another adapter of the same base to merge together with the first. Repeatable.",
        ),
        click.option("--weight", type=float, metavar="X", help="The first adapter's own weight. Default: 1."),
        click.option(
            "--combine",
            type=click.Choice(["cat", "linear", "ties", "dare_linear", "dare_ties"]),
            help="How several become one, as PEFT names it. Default: cat, the exact weighted sum.",
        ),
        click.option(
            "--density", type=float, metavar="X", help="The share of numbers that ties and dare keep."
        ),
        click.option("--seed", type=int, metavar="N", help="What dare draws from. Default: 0."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def read_combination(
    others: tuple[str, ...],
    weight: float | None,
    combine: Combine | None,
    density: float | None,
    seed: int | None,
    endpoint: str | None,
) -> Combination | None:
    """What the options say; None when there is no second adapter.

    Raises RecipeError for an option that makes no sense, and what finding an adapter raises.
    """
    from adapterhub.packaging.combination import PRUNING
    from adapterhub.packaging.merge import Combination

    settings = {"--weight": weight, "--combine": combine, "--density": density, "--seed": seed}
    given = [name for name, value in settings.items() if value is not None]
    if not others:
        if given:
            raise RecipeError(f"{given[0]} is about several adapters", "name the others with --with")
        return None
    how = combine or "cat"
    if how in PRUNING and density is None:
        raise RecipeError(f"--combine {how} needs to know how much to keep", "say --density 0.5")
    if seed is not None and not how.startswith("dare"):
        raise RecipeError(f"{how} draws nothing at random", "leave --seed out")
    return Combination(
        others=[(find_folder(name, endpoint), number) for name, number in map(_split, others)],
        weight=1.0 if weight is None else weight,
        combine=how,
        density=1.0 if density is None else density,
        seed=seed or 0,
    )


def _split(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise RecipeError(f"--with {text} does not say what weight", "write it like --with ADAPTER=0.5")
    return name, weight
