"""A release with evidence as a real run leaves it, so that cards have something to show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

from adapterhub.cards.failures import failure_id, to_jsonl
from adapterhub.cards.scores import wilson_interval
from adapterhub.packaging.evidence import (
    CURVE,
    FAILURES,
    LEDGER,
    SCORES,
    CurveEvidence,
    CurvePoint,
    Example,
    FailureCase,
    LedgerEvidence,
    LedgerPart,
    Score,
    ScoresEvidence,
    to_json,
)
from adapterhub.packaging.files import write_atomic
from adapterhub.packaging.manifest import MANIFEST_NAME, DatasetLock, Hardware, Manifest, Parent
from adapterhub.packaging.release import Release

CPU = Hardware(device="cpu", name="AMD EPYC 7R13", memory_bytes=8 * 2**30, count=2)
DECODING = {"method": "greedy", "max_new_tokens": 96, "batch_size": 16, "end_tokens": ["<|im_end|>"]}
SYSTEM = {"role": "system", "content": "Turn the order into JSON."}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; tests that want one skip without Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def rich_release(tiny_release: Path) -> Path:
    """``tiny_release`` with a full manifest and every kind of evidence."""
    edit_manifest(
        tiny_release,
        recipe={
            "name": "tiny-orders",
            "version": "0.1.0",
            "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "data": {
                "train": "orders/train.jsonl",
                "test": "orders/test.jsonl",
                "max_length": 512,
                "packing": True,
            },
            "quantization": {"type": "nf4", "double": True, "block_size": 64, "compute_dtype": "bfloat16"},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"},
            "training": {
                "steps": 120,
                "batch_size": 8,
                "learning_rate": 0.001,
                "schedule": "cosine",
                "seed": 0,
            },
        },
        datasets=(
            DatasetLock(source="train.jsonl", split="train", rows=2400, sha256="a" * 64, licence="cc0-1.0"),
            DatasetLock(source="test.jsonl", split="test", rows=200, sha256="b" * 64, licence="cc0-1.0"),
        ),
        parent=Parent(ref="someone/tiny-orders@0.0.9", manifest_sha256="c" * 64),
        tools={"adapterhub": "0.1.0", "bitsandbytes": "0.50.2", "peft": "0.21.2", "torch": "2.13.0"},
        hardware=CPU,
    )
    release = Release.open(tiny_release)
    release.with_files(
        {
            SCORES: to_json(make_scores(release)),
            CURVE: to_json(make_curve()),
            LEDGER: to_json(make_ledger()),
            FAILURES: to_jsonl(make_failures()),
        }
    )
    return tiny_release


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = Manifest.read(folder).model_copy(update=changes)
    write_atomic(folder / MANIFEST_NAME, manifest.to_bytes())


def make_scores(release: Release) -> ScoresEvidence:
    weights = release.manifest.files["adapter_model.safetensors"]
    prompt = ({"role": "user", "content": "A pint of milk for Ann, please."},)
    return ScoresEvidence(
        adapter_sha256=weights.sha256,
        data=DatasetLock(source="test.jsonl", split="test", rows=198, sha256="d" * 64),
        decoding=DECODING,
        scores=(
            Score(
                metric="exact_match",
                unit="share of rows",
                rows=198,
                base=0.0,
                adapter=194 / 198,
                base_interval=wilson_interval(0, 198),
                adapter_interval=wilson_interval(194, 198),
            ),
            Score(
                metric="loss",
                unit="nats a token",
                rows=198,
                base=1.7312,
                adapter=0.0213,
                base_interval=(1.6893, 1.7731),
                adapter_interval=(0.0164, 0.0262),
                tokens=8123,
            ),
        ),
        example=Example(
            messages=prompt,
            answer='{"name": "Ann", "items": [{"item": "milk", "quantity": 1, "unit": "pint"}]}',
        ),
        left_out=2,
        tools={"adapterhub": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        hardware=CPU,
        seconds=141.3,
    )


def make_curve() -> CurveEvidence:
    points = tuple(
        CurvePoint(
            step=step,
            loss=2.6 * math.exp(-step / 14) + 0.03 + 0.02 * math.sin(step * 1.7) ** 2,
            eval_loss=2.3 * math.exp(-step / 15) + 0.021 if step % 30 == 0 else None,
            learning_rate=1e-3,
            grad_norm=0.4,
        )
        for step in range(1, 121)
    )
    return CurveEvidence(
        points=points, steps=120, train_tokens=98_304, seconds=187.4, tokens_per_second=524.6, hardware=CPU
    )


def make_ledger() -> LedgerEvidence:
    parts = (
        LedgerPart(name="base codes", bytes=53_084_160, formula="N/2 for 106,168,320 NF4 weights"),
        LedgerPart(name="base scales", bytes=1_684_992, formula="N/64 at 1 B, and 4 B for every 256 of them"),
        LedgerPart(name="embeddings, head, norms", bytes=56_692_224, formula="28,346,112 parameters at 2 B"),
        LedgerPart(
            name="adapter", bytes=39_075_840, formula="2,442,240 parameters: weight, gradient, Adam at 16 B"
        ),
        LedgerPart(
            name="saved activations", bytes=412_876_800, formula="8 rows of 256 tokens, nothing recomputed"
        ),
    )
    return LedgerEvidence(
        device="cpu",
        parts=parts,
        predicted_peak_bytes=sum(part.bytes for part in parts),
        measured_peak_bytes=1_204_224_000,
        measured_as="peak resident set of the process, Python and libraries included",
    )


def make_failures() -> tuple[FailureCase, ...]:
    def case(prompt: str, expected: str, observed: str, base: str, kind: str) -> FailureCase:
        messages = (SYSTEM, {"role": "user", "content": prompt})
        check = {"type": "exact", "value": expected}
        return FailureCase(
            id=failure_id(messages, check),
            failure_class=kind,
            messages=messages,
            decoding=DECODING,
            expected=check,
            observed=observed,
            base_answer=base,
            since="0.1.0",
        )

    milk = '{"name": "Zdeněk", "items": [{"item": "milk", "quantity": 3, "unit": "l"}]}'
    chatter = (
        "Sure! Here is the order:\n\n1. Milk, three litres\n2. For Zdeněk\n\nLet me know if you need more."
    )
    return (
        case("Three litres of milk for Zdeněk.", milk, milk.replace("ě", "e"), chatter, "wrong_answer"),
        case("Six eggs. No, eight. Bob.", '{"name": "Bob", "items": [{"item": "egg", "quantity": 8}]}',
             '{"name": "Bob", "items": [{"item": "egg", "quantity": 6}]}', "Bob wants eggs.", "wrong_answer"),
        case("Nothing today, thanks. Eve.", '{"name": "Eve", "items": []}', '{"name": "Eve", "items": []',
             '{"name": "Eve", "items": []}', "formatting"),
        case("A dozen of each.", '{"name": null, "items": []}', '{"name": "each", "items": [' + "[" * 60,
             "", "does_not_stop"),
    )  # fmt: skip


@pytest.fixture
def edit() -> Callable[..., None]:
    """``edit(folder, licence=None)`` changes fields of a release's manifest."""
    return edit_manifest
