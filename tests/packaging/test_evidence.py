"""Evidence files: typed, read back as written, and named when they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.errors import ManifestError
from adapterhub.packaging.evidence import (
    CURVE,
    FAILURES,
    LEDGER,
    SCORES,
    CurveEvidence,
    CurvePoint,
    FailureCase,
    LedgerEvidence,
    LedgerPart,
    Score,
    ScoresEvidence,
    read_evidence,
    read_failures,
    to_json,
)
from adapterhub.packaging.manifest import DatasetLock, Frozen, Hardware

CPU = Hardware(device="cpu", name="a processor", memory_bytes=2**30)
EVIDENCE: dict[str, Frozen] = {
    LEDGER: LedgerEvidence(
        device="cpu", parts=(LedgerPart(name="base codes", bytes=10, formula="N/2"),), predicted_peak_bytes=10
    ),
    CURVE: CurveEvidence(
        points=(CurvePoint(step=1, loss=0.5), CurvePoint(step=2, eval_loss=0.25)),
        steps=2,
        train_tokens=100,
        seconds=1.5,
        tokens_per_second=66.6,
        hardware=CPU,
    ),
    SCORES: ScoresEvidence(
        adapter_sha256="0" * 64,
        data=DatasetLock(source="test.jsonl", split="test", rows=60, sha256="1" * 64),
        decoding={"do_sample": False},
        scores=(Score(metric="exact_match", unit="share of rows", rows=60, base=0.0, adapter=0.9),),
        hardware=CPU,
        seconds=3.5,
    ),
}


def failure(observed: str) -> FailureCase:
    return FailureCase(
        id="0123456789ab",
        failure_class="wrong_answer",
        messages=({"role": "user", "content": observed},),
        decoding={},
        expected={"type": "exact", "value": "x"},
        observed=observed,
        base_answer="",
        since="0.1.0",
    )


@pytest.mark.parametrize("name", EVIDENCE)
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    (tmp_path / "evidence").mkdir()
    assert read_evidence(tmp_path, name, type(EVIDENCE[name])) is None
    (tmp_path / name).write_bytes(to_json(EVIDENCE[name]))
    assert read_evidence(tmp_path, name, type(EVIDENCE[name])) == EVIDENCE[name]


@pytest.mark.parametrize("name", EVIDENCE)
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 10_000, b'{"device": "tpu"}'])
def test_what_is_broken_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "evidence").mkdir()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=name):
        read_evidence(tmp_path, name, type(EVIDENCE[name]))


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",))), max_size=4))
def test_failure_cases_stand_a_line_each_whatever_they_hold(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "evidence").mkdir()
    cases = tuple(failure(text) for text in texts)
    (folder / FAILURES).write_text("".join(case.model_dump_json() + "\n" for case in cases), encoding="utf-8")
    assert read_failures(folder) == cases


def test_a_broken_failure_case_is_named_by_its_line(tmp_path: Path) -> None:
    assert read_failures(tmp_path) is None
    (tmp_path / "evidence").mkdir()
    (tmp_path / FAILURES).write_text(failure("x").model_dump_json() + "\n{}\n")
    with pytest.raises(ManifestError, match="line 2"):
        read_failures(tmp_path)
