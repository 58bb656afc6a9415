"""Packed rows: every example once, and none sees another or the padding."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.trainer.packing import collate, pack
from adapterhub.trainer.template import IGNORED, Encoded


def example(length: int, start: int = 3) -> Encoded:
    ids = [start + i for i in range(length)]
    return Encoded(ids, [IGNORED, *ids[1:]])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 5), st.booleans())
def test_every_example_is_in_exactly_one_row_whole(lengths: list[int], seed: int, packing: bool) -> None:
    examples = [example(length, 1000 * index) for index, length in enumerate(lengths)]
    rows = pack(examples, 40, seed=seed, packing=packing)
    assert all(len(row.input_ids) == len(row.labels) == len(row.position_ids) <= 40 for row in rows)
    found = []
    for row in rows:
        begins = [at for at, position in enumerate(row.position_ids) if position == 0]
        for begin, end in zip(begins, [*begins[1:], len(row.input_ids)], strict=True):
            found.append((row.input_ids[begin:end], row.labels[begin:end]))
    assert sorted(found) == sorted((one.input_ids, one.labels) for one in examples)
    if not packing:
        assert len(rows) == len(examples)
    assert rows == pack(examples, 40, seed=seed, packing=packing)


def test_padding_carries_no_loss_and_is_a_sequence_of_its_own() -> None:
    batch = collate(pack([example(5), example(2)], 5, seed=0), pad_token_id=7)
    short = batch["input_ids"].tolist().index([3, 4, 7, 7, 7])
    assert batch["labels"][short].tolist() == [IGNORED, 4, IGNORED, IGNORED, IGNORED]
    assert batch["position_ids"][short].tolist() == [0, 1, 0, 1, 2]


def test_a_packed_example_computes_what_it_computes_alone(tiny_base: Path) -> None:
    """No attention or position leaks: logits in a packed, padded batch are those of the example alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    examples = [
        Encoded(ids, list(ids))
        for length in (9, 14, 5, 20)
        for ids in [torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()]
    ]
    rows = pack(examples, 30, seed=0)
    assert len(rows) < len(examples)
    batch = collate(rows, pad_token_id=2)
    with torch.no_grad():
        packed = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for index, row in enumerate(rows):
            begins = [at for at, position in enumerate(row.position_ids) if position == 0]
            for begin, end in zip(begins, [*begins[1:], len(row.input_ids)], strict=True):
                alone = model(input_ids=torch.tensor([row.input_ids[begin:end]])).logits[0]
                torch.testing.assert_close(packed[index, begin:end], alone, atol=1e-5, rtol=1e-4)
