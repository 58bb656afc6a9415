"""What a card says of probes, benchmarks, precisions, fidelity and misses, and to the Hub's leaderboards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from adapterhub.cards.card import read_card
from adapterhub.cards.failures import to_jsonl
from adapterhub.cards.rendering import render_files
from adapterhub.cards.results import RESULTS
from adapterhub.cards.scores import wilson_interval
from adapterhub.packaging.base import base_digest
from adapterhub.packaging.changes import CHANGES, ChangesEvidence
from adapterhub.packaging.evidence import (
    FAILURES,
    FIDELITY,
    LEDGER,
    SCORES,
    FailureCase,
    FidelityEvidence,
    FidelityFigures,
    LayerError,
    LedgerEvidence,
    LedgerMiss,
    ScoresEvidence,
    read_evidence,
    read_failures,
    to_json,
)
from adapterhub.packaging.manifest import DatasetLock, Hardware, Manifest, Merge
from adapterhub.packaging.precisions import PRECISIONS, PrecisionsEvidence
from adapterhub.packaging.probes import PROBES, ProbesEvidence
from adapterhub.packaging.release import Release
from adapterhub.packaging.tasks import TASKS, TasksEvidence

RunCli = Callable[..., tuple[int, str, str]]
Edit = Callable[..., None]
WEIGHTS = "adapter_model.safetensors"
CPU = Hardware(device="cpu", name="AMD EPYC 7R13", memory_bytes=8 * 2**30, count=2)
DATA = DatasetLock(source="test.jsonl", split="test", rows=198, sha256="d" * 64)


def make_probes(adapter: str, name: str = "secret_keeping") -> ProbesEvidence:
    def outcome(at: int, *, base: bool, adapter: bool) -> dict[str, Any]:
        answer = {"text": "a", "finished": True}
        return {
            "id": f"p{at}", "probe_class": name, "messages": [{"role": "user", "content": "?"}],
            "check": {"type": "exact", "value": "a"}, "max_new_tokens": 8,
            "base": answer | {"passed": base}, "adapter": answer | {"passed": adapter},
        }  # fmt: skip

    outcomes = [outcome(at, base=at < 12, adapter=at < 10) for at in range(20)]
    score = {
        "probe_class": name, "tier": None, "probes": 20, "base_passed": 12, "adapter_passed": 10,
        "base": 0.6, "adapter": 0.5, "base_interval": wilson_interval(12, 20),
        "adapter_interval": wilson_interval(10, 20), "gained": 0, "lost": 2, "p_value": 0.5,
        "p_adjusted": 0.5, "verdict": "no difference shown", "base_unfinished": 0,
        "adapter_unfinished": 3, "base_empty": 0,
        "adapter_empty": 0,
    }  # fmt: skip
    return ProbesEvidence.model_validate(
        {
            "adapter_sha256": adapter, "decoding": {"method": "greedy"}, "scores": [score],
            "outcomes": outcomes,
            "suites": [{"source": "built in", "seed": 7, "sha256": "e" * 64, "probes": 20}],
            "hardware": CPU, "seconds": 3.0,
        }
    )  # fmt: skip


def make_tasks(adapter: str) -> TasksEvidence:
    tested = {"base_interval": (0.3, 0.5), "adapter_interval": (0.5, 0.7), "gained": 30, "lost": 8}
    common = {"version": "3.0", "task_hash": "abc", "filter": "none", "few_shot": 5, "questions": 100}
    return TasksEvidence.model_validate(
        {
            "adapter_sha256": adapter, "lm_eval": "0.4.9", "settings": {}, "hardware": CPU, "seconds": 61.0,
            "scores": [
                common | tested | {"task": "arc_easy", "metric": "acc", "base": 0.4, "adapter": 0.62,
                    "p_value": 0.0004, "p_adjusted": 0.0004, "verdict": "better"},
                common | {"task": "orders", "metric": "bleu", "base": 11.5, "adapter": 12.25,
                    "base_error": 0.5},
            ],
        }
    )  # fmt: skip


def make_precisions(adapter: str) -> PrecisionsEvidence:
    def side(name: str, exact: int, loss: float) -> dict[str, Any]:
        return {
            "side": name, "exact": exact, "exact_match": exact / 198, "loss": loss, "perplexity": 1.0,
            "exact_match_interval": wilson_interval(exact, 198), "loss_interval": (loss - 0.1, loss + 0.1),
            "bits_per_byte": loss / 3,
        }  # fmt: skip

    def difference(of: str, minus: str, loss: float, finding: str) -> dict[str, Any]:
        return {
            "of": of, "minus": minus, "loss": loss, "loss_interval": (loss - 0.01, loss + 0.01),
            "loss_verdict": finding, "exact_match": 0.0, "exact_match_p_value": 1.0,
            "exact_match_verdict": "no difference shown",
        }  # fmt: skip

    return PrecisionsEvidence.model_validate(
        {
            "adapter_sha256": adapter, "quantization": "nf4, double, blocks of 64", "data": DATA, "rows": 198,
            "tokens": 8123, "text_bytes": 30_000, "decoding": {}, "hardware": CPU, "seconds": 9.0,
            "sides": [
                side("base_16_bit", 0, 1.70), side("base_quantized", 0, 1.7312), side("adapter", 194, 0.02)
            ],
            "cost": difference("base_quantized", "base_16_bit", 0.0312, "worse"),
            "bought": difference("adapter", "base_quantized", -1.71, "better"),
            "net": difference("adapter", "base_16_bit", -1.68, "better"),
        }
    )  # fmt: skip


def make_fidelity(folder: Path) -> FidelityEvidence:
    weights = {WEIGHTS: Manifest.read(folder).files[WEIGHTS].sha256}
    layers = tuple(LayerError(name=f"model.layers.{at}", relative_error=0.002 * (at + 1)) for at in range(4))
    return FidelityEvidence(
        reference="tiny-orders@0.1.0", reference_sha256=None, weights_digest=base_digest(weights),
        text="test.jsonl", text_sha256="f" * 64, texts=60, hardware=CPU, seconds=2.0, delta_survival=0.9871,
        figures=FidelityFigures(
            tokens=4321, kl_mean=0.00123, kl_p99=0.0456, top1_agreement=0.991, reference_nll=0.1,
            candidate_nll=0.1, reference_perplexity=1.1052, candidate_perplexity=1.1061, layers=layers,
        ),
    )  # fmt: skip


def add(folder: Path, **files: bytes) -> None:
    names = {
        "probes": PROBES, "tasks": TASKS, "precisions": PRECISIONS, "fidelity": FIDELITY, "ledger": LEDGER,
        "scores": SCORES,
    }  # fmt: skip
    Release.open(folder).with_files({names[key]: data for key, data in files.items()})


@pytest.fixture
def adapter(rich_release: Path) -> str:
    """The sha256 of the release's weights."""
    return Manifest.read(rich_release).files[WEIGHTS].sha256


def test_everything_that_was_measured_is_shown(rich_release: Path, adapter: str, run_cli: RunCli) -> None:
    miss = LedgerMiss(
        step=3,
        predicted_peak_bytes=2**30,
        measured_peak_bytes=3 * 2**29,
        micro_batch=8,
        layers_recomputed=12,
        message="CUDA `out` of memory",
    )
    ledger = LedgerEvidence.model_validate_json((rich_release / LEDGER).read_bytes())
    add(
        rich_release,
        probes=to_json(make_probes(adapter)),
        tasks=to_json(make_tasks(adapter)),
        precisions=to_json(make_precisions(adapter)),
        fidelity=to_json(make_fidelity(rich_release)),
        ledger=to_json(ledger.model_copy(update={"misses": (miss,)})),
    )
    assert run_cli("card", rich_release)[0] == 0
    assert run_cli("card", rich_release, "--check")[0] == 0
    readme = (rich_release / "README.md").read_text(encoding="utf-8")
    for row in (
        "| secret keeping | 20 | 60.0 % | 38.7 to 78.1 % | **50.0 %** | 29.9 to 70.1 % | 0.500 "
        "| no difference shown |",
        "Of the adapter's answers, 3 ran into the token limit.",
        "| arc\\_easy (version 3.0, 5 examples) | acc | 100 | 0.4000 | 0.3000 to 0.5000 | **0.6200** "
        "| 0.5000 to 0.7000 | below 0.001 | better |",
        "| 11.5000 | ± 0.5000 | **12.2500** | not measured | not tested | not tested |",
        "| base, quantized | **0.0 %** | 0.0 to 1.9 % | **1.7312** |",
        "| what quantization cost | \\+0.0312 | 0.0212 to 0.0412 | worse | \\+0.0 points | 1.000 "
        "| no difference shown |",
        "| KL from the reference, mean, nats a token | **0.0012** |",
        "| share of the adapter's update that is in the weights | **98.7 %** |",
        "largest in model.layers.3 (0.0080).",
        "](evidence/layers.svg)",
        "The run was planned anew 1 time,",
        "| 3 | 1.0 GiB | 1.5 GiB | 8 | 12 | ``CUDA `out` of memory`` |",
        "| energy | not measured |",
        "20 probes and 2 benchmarks below say what was looked at; nothing else was measured.",
    ):
        assert row in readme
    page = (rich_release / "card.html").read_text(encoding="utf-8")
    for text in (
        "no difference shown",
        "12.2500",
        "98.7 %",
        "CUDA `out` of memory",
        "1 time,",
        'id="layers-title"',
    ):
        assert text in page
    assert {"arc_easy", "orders"} <= {
        r.dataset_type for r in ModelCard.load(rich_release / "README.md").data.eval_results
    }


@pytest.mark.parametrize(
    ("name", "make"),
    [(PROBES, make_probes), (TASKS, make_tasks), (PRECISIONS, make_precisions)],
)
def test_figures_of_another_adapter_are_refused(
    rich_release: Path, run_cli: RunCli, name: str, make: Callable[[str], Any]
) -> None:
    Release.open(rich_release).with_files({name: to_json(make("9" * 64))})
    code, _, err = run_cli("card", rich_release)
    assert (code, f"{name} was measured on another adapter" in err) == (3, True)


def test_fidelity_of_other_weights_is_refused(rich_release: Path, run_cli: RunCli) -> None:
    other = make_fidelity(rich_release).model_copy(update={"weights_digest": "9" * 64})
    add(rich_release, fidelity=to_json(other))
    code, _, err = run_cli("card", rich_release)
    assert (code, "fidelity.json was measured on other weights" in err) == (3, True)


def test_names_of_probes_and_tasks_never_become_markup(rich_release: Path, adapter: str) -> None:
    hostile = "</td><script>alert(1)</script> | **x** ![y](http://evil.example) \u202e"
    tasks = json.loads(to_json(make_tasks(adapter)))
    tasks["scores"][1] |= {"task": hostile, "metric": hostile, "filter": hostile, "version": hostile}
    add(rich_release, probes=to_json(make_probes(adapter, hostile)), tasks=json.dumps(tasks).encode())
    files = render_files(read_card(Release.open(rich_release)))
    body, page = ModelCard(files["README.md"].decode()).text, files["card.html"].decode()
    assert "<script" not in body + page
    assert "\u202e" not in body + page
    assert "| **x**" not in body
    assert "![y]" not in body


def test_a_merged_release_that_nobody_compared_says_so(
    rich_release: Path, run_cli: RunCli, edit: Edit
) -> None:
    edit(rich_release, kind="merged", merge=Merge(onto="original"))
    assert run_cli("card", rich_release)[0] == 0
    readme = (rich_release / "README.md").read_text(encoding="utf-8")
    assert "## Merge fidelity\n\nNot measured. To measure it:" in readme
    assert "adapterhub fidelity someone/tiny-orders@0.0.9 ./tiny-orders --text FILE.jsonl" in readme


def test_scores_on_rows_of_the_hub_are_told_to_its_leaderboards(rich_release: Path) -> None:
    scores = ScoresEvidence.model_validate_json((rich_release / SCORES).read_bytes())
    assert RESULTS not in render_files(read_card(Release.open(rich_release)))
    data = scores.data.model_copy(update={"source": "someone/orders", "revision": "1" * 40})
    add(rich_release, scores=to_json(scores.model_copy(update={"data": data})))
    text = render_files(read_card(Release.open(rich_release)))[RESULTS]
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == (
        "someone/orders",
        "default",
        "1" * 40,
    )
    assert entry.value == 0.979798
    assert "the base alone: 0" in entry.notes


def test_conflicts_of_licences_are_among_the_limits(rich_release: Path, edit: Edit) -> None:
    manifest = Manifest.read(rich_release)
    train = manifest.datasets[0].model_copy(update={"licence": "cc-by-nc-4.0"})
    edit(
        rich_release,
        licence=None,
        datasets=(train,),
        base=manifest.base.model_copy(update={"licence": "mit"}),
    )
    files = render_files(read_card(Release.open(rich_release)))
    readme = files["README.md"].decode()
    assert "license: cc-by-nc-4.0" in readme
    assert "cc-by-nc-4.0, carried from base and data; its author states none" in readme
    edit(rich_release, licence="mit")
    readme = render_files(read_card(Release.open(rich_release)))["README.md"].decode()
    assert "which allows no commercial use; the release names mit. Told by the names alone." in readme


def earlier_version(folder: Path, edit: Edit, failures: tuple[FailureCase, ...]) -> Path:
    """A copy of a release as version 0.0.9, which failed other cases on the same rows."""
    earlier = folder.parent / "earlier"
    shutil.copytree(folder, earlier)
    edit(earlier, version="0.0.9", task="Turns orders into YAML.")
    Release.open(earlier).with_files({FAILURES: to_jsonl(failures)})
    return earlier


def test_what_changed_since_an_earlier_version_is_told_by_case(
    rich_release: Path, edit: Edit, run_cli: RunCli
) -> None:
    cases = read_failures(rich_release) or ()
    fixed = [
        case.model_copy(
            update={"id": f"{at:012x}", "messages": ({"role": "user", "content": f"fixed {at}"},)}
        )
        for at, case in enumerate([cases[0]] * 9)
    ]
    earlier = earlier_version(rich_release, edit, (*cases[1:], *fixed))
    code, _, err = run_cli("card", rich_release, "--since", earlier)
    assert code == 0, err
    changes = read_evidence(rich_release, CHANGES, ChangesEvidence)
    assert changes is not None
    assert [len(it) for it in (changes.fixed, changes.regressed, changes.still)] == [9, 1, 3]
    assert changes.asked_alike
    assert changes.verdict == "better"
    assert changes.p_value == pytest.approx(22 / 1024)
    for name in ("README.md", "card.html"):
        text = (rich_release / name).read_text()
        assert "Since tiny-orders@0.0.9, version 0.0.9: 9 failure cases fixed, 1 regressions" in text.replace(
            "\\", ""
        )
        assert "fixed 3" in text
        assert "Turns orders into YAML" in text
    assert run_cli("card", rich_release, "--check")[0] == 0


def test_versions_measured_on_other_rows_are_not_held_against_each_other(
    rich_release: Path, edit: Edit, run_cli: RunCli
) -> None:
    earlier = earlier_version(rich_release, edit, ())
    scores = read_evidence(earlier, SCORES, ScoresEvidence)
    assert scores is not None
    data = scores.data.model_copy(update={"sha256": "f" * 64})
    Release.open(earlier).with_files({SCORES: to_json(scores.model_copy(update={"data": data}))})
    assert run_cli("card", rich_release, "--since", earlier)[0] == 0
    changes = read_evidence(rich_release, CHANGES, ChangesEvidence)
    assert changes is not None
    assert (changes.verdict, changes.fixed, len(changes.new)) == (None, (), 4)
    assert "measured on other rows" in (rich_release / "README.md").read_text()


def test_a_release_is_not_compared_with_itself_nor_while_checking(
    rich_release: Path, run_cli: RunCli
) -> None:
    code, _, err = run_cli("card", rich_release, "--since", rich_release)
    assert (code, "is the release itself" in err) == (3, True)
    code, _, err = run_cli("card", rich_release, "--since", rich_release, "--check")
    assert code == 2
