"""A small training run: rows, a recipe for the tiny base, and the command line that trains it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """``with interrupting(5):`` Ctrl-C comes to whatever trains here when its step 5 is done."""
    from adapterhub.trainer import progress

    @contextmanager
    def interrupted(at: int) -> Iterator[None]:
        class Interrupting(progress.PlainProgress):
            def step(self, done: int, *others: float) -> None:
                if done == at:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(progress, "training_progress", Interrupting)
            yield

    return interrupted


@pytest.fixture
def rows(tmp_path: Path, write_jsonl: Callable) -> Path:
    """A folder with 40 training rows and 8 held-out rows that can be learned: counting words."""
    draw = random.Random(0)
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, count in (("train", 40), ("test", 8)):
        goods = [draw.choices(["apples", "pears", "milk"], k=draw.randint(1, 4)) for _ in range(count)]
        write_jsonl(
            folder / f"{split}.jsonl",
            [
                {"prompt": f"{split}: {' and '.join(names)}", "completion": f'{{"n":{len(names)}}}'}
                for names in goods
            ],
        )
    return folder


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, rows: Path) -> Path:
    """A recipe for 8 optimizer steps on the tiny base, with dropout so that random state matters."""
    path = tmp_path / "recipe.yaml"
    content = {
        "name": "tiny-counts",
        "task": "Counts the goods.",
        "licence": "apache-2.0",
        "base": str(tiny_base),
        "data": {"train": "rows/train.jsonl", "test": "rows/test.jsonl", "max_length": 96},
        "lora": {"rank": 4, "dropout": 0.1},
        "training": {"steps": 8, "batch_size": 4, "micro_batch": 2, "learning_rate": 1e-2, "save_every": 3},
    }
    path.write_text(yaml.safe_dump(content))
    return path
