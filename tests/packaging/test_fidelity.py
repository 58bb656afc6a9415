"""``adapterhub fidelity``: what a model lost against another, measured on real text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.packaging.evidence import FIDELITY, FidelityEvidence, read_evidence
from adapterhub.packaging.merge import Onto, merge_adapter
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]

ROWS = [
    {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
    for prompt, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Two apples for Ann, please.", '{"item": "apples", "quantity": 2}'),
        ("The quick brown fox", "jumps over the lazy dog."),
    )
]


@pytest.fixture
def rows(tmp_path: Path, write_jsonl: Callable[[Path, list[dict]], Path]) -> Path:
    return write_jsonl(tmp_path / "test.jsonl", ROWS)


@pytest.fixture
def merged(tiny_release: Path, tiny_base: Path, tmp_path: Path) -> Callable[[Onto], Path]:
    def merge(onto: Onto) -> Path:
        out = tmp_path / f"merged-{onto}"
        merge_adapter(tiny_release, tiny_base, out, onto=onto)
        return out

    return merge


def measured(folder: Path) -> FidelityEvidence:
    evidence = read_evidence(folder, FIDELITY, FidelityEvidence)
    assert evidence is not None
    return evidence


def test_a_model_is_faithful_to_itself(tiny_base: Path, rows: Path, run_cli: RunCli) -> None:
    code, printed, _err = run_cli("fidelity", tiny_base, tiny_base, "--text", rows, "--json")
    assert code == 0
    found = FidelityEvidence.model_validate_json(printed)
    figures = found.figures
    assert (figures.kl_mean, figures.kl_p99, figures.top1_agreement) == (0, 0, 1)
    assert figures.reference_nll == figures.candidate_nll
    assert figures.reference_perplexity == pytest.approx(math.exp(figures.reference_nll))
    assert [layer.name for layer in figures.layers] == ["model.layers.0", "model.layers.1"]
    assert all(layer.relative_error == 0 for layer in figures.layers)
    assert (found.reference_sha256, found.delta_survival) == (None, None)


def test_the_figures_are_those_of_all_logits_at_once(
    tiny_base: Path, tiny_release: Path, merged: Callable[[Onto], Path], rows: Path, run_cli: RunCli
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from adapterhub.packaging.fidelity import compare_models

    torch.manual_seed(0)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for folder in (tiny_base, merged("original"))
    ]
    texts = [torch.randint(0, 300, (length,)).tolist() for length in (2, 70, 150)]
    figures = compare_models(*models, texts)
    kl, nll = [], []
    with torch.no_grad():
        for ids in texts:
            p, q = (
                model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(dim=-1) for model in models
            )
            kl += (p.exp() * (p - q)).sum(dim=-1).tolist()
            nll += (-q[range(len(ids) - 1), ids[1:]]).tolist()
    assert figures.tokens == len(kl) == 219
    assert figures.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert figures.kl_p99 == pytest.approx(sorted(kl)[math.ceil(0.99 * len(kl)) - 1], rel=1e-3)
    assert figures.candidate_nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert 0 < figures.layers[0].relative_error < 2


def test_a_merge_onto_trained_weights_is_nearer_than_onto_the_original(
    tiny_release: Path, tiny_base: Path, merged: Callable[[Onto], Path], rows: Path, run_cli: RunCli
) -> None:
    found = {}
    for onto in ("trained", "original"):
        out = merged(onto)
        code, printed, _err = run_cli("fidelity", tiny_release, out, "--text", rows, "--base", tiny_base)
        assert code == 0
        assert "nats a token" in printed
        found[onto] = measured(out)
        Release.open(out).check_files()  # the evidence is listed
        assert found[onto].reference == "tiny-orders@0.1.0"
        assert found[onto].reference_sha256 == Release.open(tiny_release).digest
        assert found[onto].delta_survival == pytest.approx(1, abs=0.05)
    assert found["trained"].figures.kl_mean < found["original"].figures.kl_mean / 2
    assert found["trained"].figures.layers[0].relative_error < 0.02


def test_plain_text_and_a_limit(
    tiny_base: Path, merged: Callable[[Onto], Path], tmp_path: Path, run_cli: RunCli
) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    args = ("fidelity", tiny_base, merged("original"), "--text", text, "--json")
    whole = json.loads(run_cli(*args)[1])
    first = json.loads(run_cli(*args, "--limit", 1)[1])
    assert whole["texts"] > 1
    assert (first["texts"], first["limit"], first["figures"]["tokens"]) == (1, 1, 511)


def test_a_signed_release_is_measured_and_left_as_it_is(
    tiny_base: Path, merged: Callable[[Onto], Path], rows: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out = merged("original")
    assert run_cli("keygen", tmp_path / "keys")[0] == 0
    assert run_cli("sign", out, "--key", tmp_path / "keys" / "adapterhub.key")[0] == 0
    code, printed, err = run_cli("fidelity", tiny_base, out, "--text", rows)
    assert code == 0
    assert "KL" in printed
    assert "is signed" in err
    assert not (out / FIDELITY).exists()
    assert run_cli("verify", out)[0] == 0


def test_what_cannot_be_compared_is_said(
    tiny_base: Path, tiny_adapter: Path, rows: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    assert run_cli("fidelity", tiny_base, tiny_base, "--text", tmp_path / "none.txt")[0] == 2
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\xd8")
    code, _printed, err = run_cli("fidelity", tiny_base, tiny_base, "--text", binary)
    assert code == 2
    assert "not UTF-8" in err
    code, _printed, err = run_cli("fidelity", tiny_base, tiny_adapter, "--text", rows)
    assert code == 3
    assert "neither a release nor a checkpoint" in err


def test_codes_that_were_repacked_are_not_read(tiny_base: Path) -> None:
    """The first forward pass of inference does it, on a processor with bfloat16 instructions."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    from adapterhub.errors import AdapterHubError
    from adapterhub.packaging.manifest import Quantization
    from adapterhub.packaging.survival import weights_in
    from adapterhub.trainer.model import load_base

    model = load_base(tiny_base, Quantization(), "cpu")
    weight = model.model.layers[0].mlp.down_proj.weight
    read = weights_in(model)
    assert read("model.layers.0.mlp.down_proj").shape == (64, 128)
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(AdapterHubError, match="repacked by a forward pass"):
        read("model.layers.0.mlp.down_proj")


def test_models_of_other_shapes_are_refused(tiny_base: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapterhub.errors import ReleaseError
    from adapterhub.packaging.fidelity import compare_models

    models = [
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=16,
                num_attention_heads=2,
                vocab_size=32,
                num_hidden_layers=n,
            )
        )
        for n in (1, 2)
    ]
    with pytest.raises(ReleaseError, match="number of decoder layers: 1 and 2"):
        compare_models(*models, [[1, 2, 3]])
