"""How near the arena's ratings come to QLoRA's Table 1, and how long they take.

Takes the paper's own judgments of the Vicuna questions (artidoro/qlora, eval/ratings-gpt4/vicuna), as CSV::

    python benchmarks/arena.py pairwise.csv relative.csv [--out benchmarks/results/arena.json]

Columns: question_id,first,second,verdict and question_id,system,order,chatgpt,score. Times are wall times in
seconds. Exits 1 when K=4 misses the table by more than a point or in a rank, or K=32 does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from machine import describe_machine

from adapterhub.cards.agreement import measure_position_bias
from adapterhub.cards.judgments import import_files
from adapterhub.cards.ratings import Ratings, rate_by_bradley_terry, rate_by_elo
from adapterhub.cards.relative import compare_with_reference

# QLoRA (arXiv 2305.14314), Table 1: Elo from GPT-4's judgments, mean over 10,000 orderings.
TABLE_1 = {
    "gpt-4": 1348,
    "guanaco-65b": 1022,
    "guanaco-33b": 992,
    "vicuna-13b": 974,
    "chatgpt": 966,
    "guanaco-13b": 916,
    "bard": 902,
    "guanaco-7b": 879,
}
ORDERINGS = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairwise", type=Path)
    parser.add_argument("relative", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "arena.json")
    options = parser.parse_args()
    machine = describe_machine("adapterhub", "numpy")
    arena = import_files([options.pairwise, options.relative])
    bias = measure_position_bias(arena.pairwise)
    measured = {
        "elo_k4": measure(lambda: rate_by_elo(arena.pairwise, 4, ORDERINGS)),
        "elo_k32": measure(lambda: rate_by_elo(arena.pairwise, 32, ORDERINGS)),
        "bradley_terry": measure(lambda: rate_by_bradley_terry(arena.pairwise)),
    }
    standings = {standing.system: standing for standing in compare_with_reference(arena.relative)}
    result = {
        "what": __doc__.splitlines()[0],
        **machine,
        "sources": [source.model_dump() for source in arena.sources],
        "unparsed": sum(judgment.verdict == "unparsed" for judgment in arena.pairwise),
        "table_1": TABLE_1,
        **measured,
        "first_answer_wins": bias and bias.first,
        "relative_to_chatgpt": {
            name: round(standings[name].share or 0, 4) for name in TABLE_1 if name in standings
        },
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(measured, indent=2))
    held = measured["elo_k4"]["largest_miss"] <= 1 and measured["elo_k4"]["same_ranks"]
    return 0 if held and measured["elo_k32"]["largest_miss"] > 1 else 1


def measure(rate: Callable[[], Ratings]) -> dict:
    started = time.perf_counter()
    ratings = rate()
    seconds = time.perf_counter() - started
    rated = {system.system: system for system in ratings.systems}
    return {
        "seconds": round(seconds, 2),
        "draws": ratings.draws,
        "ratings": {name: round(system.rating, 2) for name, system in rated.items()},
        "intervals": {name: [round(bound, 1) for bound in system.interval] for name, system in rated.items()},
        "largest_miss": round(max(abs(rated[name].rating - points) for name, points in TABLE_1.items()), 2),
        "same_ranks": list(rated) == list(TABLE_1),
    }


if __name__ == "__main__":
    sys.exit(main())
