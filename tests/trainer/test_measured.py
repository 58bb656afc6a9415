"""The ledger against every peak that benchmarks/ledger_accuracy.py and train_speed.py measured on a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.ledger import GIB, ledger
from adapterhub.trainer.plan import plan
from adapterhub.trainer.recipe import Recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CAP = Hardware(device="cuda", name="NVIDIA H200", memory_bytes=48 * GIB)


def measured() -> list[dict[str, Any]]:
    lines = []
    for name in ("ledger_accuracy", "train_speed", "train_speed_linears", "train_speed_kept_weights"):
        results = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))["results"]
        lines += [line for line in results if line["stack"] == "ours" and "peak_reserved_bytes" in line]
    return lines


def label(line: dict[str, Any]) -> str:
    chosen = line["setting"]
    return f"{line['size']}-{line['length']}-" + "-".join(str(value) for value in chosen.values())


@pytest.fixture
def shape_of_size(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from synthetic_model import shape_of_size

    return shape_of_size


def recipe(length: int) -> Recipe:
    """That of train_stacks.build_ours."""
    return Recipe.from_dict(
        {
            "name": "bench",
            "base": "synthetic",
            "data": {"train": "synthetic", "max_length": length},
            "lora": {"rank": 64, "alpha": 16},
            "training": {"batch_size": 16},
        },
        Path(),
    )


@pytest.mark.parametrize("line", measured(), ids=label)
def test_each_measured_peak_is_predicted_within_3_percent(line: dict[str, Any], shape_of_size: Any) -> None:
    found = ledger(shape_of_size(line["size"]), recipe(line["length"]), CAP, Setting(**line["setting"]))
    assert found.predicted_peak_bytes == pytest.approx(
        line["peak_reserved_bytes"] + line["context_bytes"], rel=0.03
    )


def test_every_size_was_measured() -> None:
    assert {line["size"] for line in measured()} >= {"7B", "13B", "33B", "65B", "Gemma 2 9B", "Gemma 3 1B"}
    assert len(measured()) >= 12


@pytest.mark.parametrize("size", ["7B", "13B", "33B", "65B"])
def test_a_plan_leaves_its_reserve_of_the_card_free(size: str, shape_of_size: Any) -> None:
    """A plan for 65B once took 48.2 GiB of 48: what was measured then no longer counts as fitting."""
    made = plan(shape_of_size(size), recipe(2048), CAP)
    assert made.fits
    assert made.predicted_peak_bytes <= 48 * GIB - made.reserve_bytes
