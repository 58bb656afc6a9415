"""``merge`` and ``requantize`` with text: codes chosen on it, the result measured, refused over the limit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from adapterhub.commands.judging import check_kl
from adapterhub.packaging.evidence import FIDELITY, FidelityEvidence, read_evidence
from adapterhub.packaging.merge import merge_adapter
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]
WORDS = ("apples", "pears", "milk", "bread", "plums", "cheese")


@pytest.fixture
def text(tmp_path: Path, write_jsonl: Callable[[Path, list[dict]], Path]) -> Path:
    def row(number: int) -> dict:
        item = WORDS[number % len(WORDS)]
        answer = f'{{"item": "{item}", "quantity": {number}}}'
        return {
            "messages": [
                {"role": "user", "content": f"{number} {item} for Ann, please."},
                {"role": "assistant", "content": answer},
            ]
        }

    return write_jsonl(tmp_path / "text.jsonl", [row(number) for number in range(1, 13)])


@pytest.mark.slow
def test_a_merge_with_text_is_calibrated_and_measured_on_other_rows(
    tiny_release: Path, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out = tmp_path / "out"
    code, printed, err = run_cli(
        "merge", tiny_release, "--to", "nf4", "--onto", "trained", "--base", tiny_base, "--text", text,
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(printed)
    found = read_evidence(out, FIDELITY, FidelityEvidence)
    assert found is not None
    assert found == FidelityEvidence.model_validate(result["fidelity"])
    assert (found.texts, found.skipped, result["rounding"]["texts"]) == (3, 9, 9)
    assert found.reference_sha256 == Release.open(tiny_release).digest
    assert found.delta_survival is not None
    assert found.delta_survival > 0.5
    Release.open(out).check_files()
    code, printed, err = run_cli("fidelity", tiny_release, out, "--text", text, "--base", tiny_base, "--json")
    again = FidelityEvidence.model_validate_json(printed)
    assert "codes of" in err  # chosen on this very text: the evidence stays that of other texts
    assert read_evidence(out, FIDELITY, FidelityEvidence) == found
    assert again.delta_survival == pytest.approx(found.delta_survival)
    assert again.weights_digest == found.weights_digest


@pytest.mark.slow
def test_over_the_limit_nothing_is_left(
    tiny_release: Path, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out = tmp_path / "made" / "out"
    args = ("merge", tiny_release, "--to", "nf4", "--onto", "original", "--base", tiny_base, "--out", out)
    code, printed, err = run_cli(*args, "--rounding", "nearest", "--held-out", text, "--max-kl", "1e-9")
    assert (code, printed) == (3, "")
    assert "over the limit of 1e-09" in err
    assert "model.layers." in err
    assert list(out.parent.iterdir()) == []
    code, printed, err = run_cli(*args, "--rounding", "nearest", "--held-out", text, "--max-kl", "99")
    assert code == 0
    assert "KL" in printed
    assert "warning" not in err


@pytest.mark.slow
def test_without_a_limit_much_is_warned_of_with_the_worst_layers(
    tiny_release: Path,
    tiny_base: Path,
    text: Path,
    tmp_path: Path,
    run_cli: RunCli,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed, err = run_cli(
        "merge", tiny_release, "--base", tiny_base, "--to", "nf4", "--onto", "original", "--held-out", text,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert (code, "warning" in err) == (0, False)  # the small model is not far from anything
    evidence = FidelityEvidence.model_validate(json.loads(printed)["fidelity"])
    worst = max(evidence.figures.layers, key=lambda layer: layer.relative_error)
    for kl, warned in ((0.05, False), (0.0512, True)):
        far = evidence.figures.model_copy(update={"kl_mean": kl})
        check_kl(evidence.model_copy(update={"figures": far}), None)
        err = capsys.readouterr().err
        told = "warning: 0.0512 nats a token from tiny-orders@0.1.0, more than 0.05; furthest: "
        assert err.startswith(f"{told}{worst.name}: relative error {worst.relative_error:.4f}" * warned)
        assert bool(err) is warned


@pytest.mark.slow
def test_auto_keeps_the_target_with_the_likelier_text(
    tiny_release: Path, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out = tmp_path / "made" / "out"
    code, printed, err = run_cli(
        "merge", tiny_release, "--to", "fp4", "--onto", "auto", "--base", tiny_base, "--text", text,
        "--rounding", "nearest", "--out", out,
    )  # fmt: skip
    assert code == 0, err
    release = Release.open(out)
    release.check_files()
    found = read_evidence(out, FIDELITY, FidelityEvidence)
    assert found is not None
    assert found.instead_of is not None
    assert release.manifest.merge is not None
    assert {release.manifest.merge.onto, found.instead_of.onto} == {"trained", "original"}
    assert found.figures.candidate_nll <= found.instead_of.candidate_nll
    assert f"picked       {release.manifest.merge.onto}" in printed
    assert list(out.parent.iterdir()) == [out]
    again = ("fidelity", tiny_release, out, "--base", tiny_base, "--text", text)
    assert run_cli(*again)[0] == 0
    measured = read_evidence(out, FIDELITY, FidelityEvidence)
    assert measured is not None
    assert measured.instead_of == found.instead_of
    code, _printed, err = run_cli("card", out)
    assert code == 0, err
    assert f"Merged onto {found.instead_of.onto} weights instead" in (out / "README.md").read_text()


def test_a_plain_adapter_is_measured_too(
    tiny_adapter: Path, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    code, printed, err = run_cli(
        "merge", tiny_adapter, "--to", "int8", "--onto", "trained", "--base", tiny_base, "--held-out", text,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "NLL" in printed
    found = read_evidence(tmp_path / "out", FIDELITY, FidelityEvidence)
    assert found is not None
    assert (found.reference, found.reference_sha256) == ("plain", None)


KINDS: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
    "DoRA": {"use_dora": True},
    "saved whole": {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj", "up_proj"]},
    "factors on the head": {"target_modules": ["lm_head", "q_proj"]},
    "factors on embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "trained tokens": {"trainable_token_indices": [3, 5]},
    "resized": {"target_modules": ["q_proj"], "resize": 400},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_has_a_live_model_to_be_measured_against(
    kind: str, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    settings = dict(KINDS[kind])
    resize = settings.pop("resize", None)
    adapter = tmp_path / "adapter"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    if resize:
        model.resize_token_embeddings(resize)
    peft = get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    )
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    peft.save_pretrained(adapter)
    command = ("merge", adapter, "--base", tiny_base, "--to", "bf16", "--held-out", text)
    found = {}
    for onto in ("trained", "original"):
        code, printed, err = run_cli(*command, "--onto", onto, "--out", tmp_path / onto, "--json")
        assert code == 0, err
        evidence = FidelityEvidence.model_validate(json.loads(printed)["fidelity"])
        found[onto] = evidence.figures.kl_mean
        assert evidence.delta_survival is None or evidence.delta_survival > 0.5
    assert found["trained"] < 0.3 * found["original"]


def test_without_text_it_says_what_that_loses(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    args = ("merge", tiny_release, "--to", "nf4", "--base", tiny_base, "--out", tmp_path / "out")
    code, _printed, err = run_cli(*args, "--onto", "original")
    assert code == 0
    assert "rounding to nearest" in err
    assert "not measured how faithful" in err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--onto", "auto"), "picks by the likelihood"),
        (("--onto", "original", "--max-kl", "1"), "needs the result to be measured"),
        (("--onto", "original", "--rounding", "calibrated"), "needs text"),
        (("--onto", "original", "--text", "absent.jsonl"), "no such file"),
        (("--onto", "original", "--text", "{text}", "--held-out", "{text}"), "both chosen on and measured"),
        (("--onto", "original", "--no-fidelity", "--held-out", "{text}"), "does not use"),
        (("--onto", "original", "--text", "{text}", "--max-kl", "nan"), "is no limit"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    given: tuple[str, ...],
    words: str,
    tiny_release: Path,
    tiny_base: Path,
    text: Path,
    tmp_path: Path,
    run_cli: RunCli,
) -> None:
    out = tmp_path / "out"
    filled = [part.format(text=text) for part in given]
    code, printed, err = run_cli(
        "merge", tiny_release, "--to", "nf4", "--base", tiny_base, "--out", out, *filled
    )
    assert (code, printed) == (2, "")
    assert words in err
    assert not out.exists()


def test_a_merged_release_is_requantized(
    tiny_release: Path, tiny_base: Path, text: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    merged, out, direct = tmp_path / "merged", tmp_path / "out", tmp_path / "direct"
    merge_adapter(tiny_release, tiny_base, merged, onto="original")
    code, printed, err = run_cli("requantize", merged, "--to", "nf4", "--text", text, "--out", out)
    assert code == 0, err
    assert "stored in    nf4, 14 of 20 tensors" in printed
    release = Release.open(out)
    release.check_files()
    manifest = release.manifest
    assert (manifest.name, manifest.kind) == ("tiny-orders-nf4", "quantized")
    assert manifest.merge is not None
    assert (manifest.merge.onto, manifest.merge.dtype, manifest.merge.rounding) == (
        "original",
        "nf4",
        "calibrated",
    )
    assert manifest.parent is not None
    assert manifest.parent.manifest_sha256 == Release.open(merged).digest
    found = read_evidence(out, FIDELITY, FidelityEvidence)
    assert found is not None
    assert found.reference == "tiny-orders-merged@0.1.0"
    # int8 of the bf16 sum is int8 of the sum, but for the one rounding more.
    code, _printed, _err = run_cli("requantize", merged, "--to", "int8", "--no-fidelity", "--out", direct)
    assert code == 0
    code, _printed, err = run_cli("requantize", out, "--to", "int8", "--out", tmp_path / "twice")
    assert code == 3
    assert "of kind 'quantized'" in err


def test_a_changed_shard_is_not_requantized(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out"
    merge_adapter(tiny_release, tiny_base, merged, onto="original")
    shard = merged / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, _printed, err = run_cli("requantize", merged, "--to", "int8", "--out", out)
    assert code == 4, err
    assert not out.exists()
