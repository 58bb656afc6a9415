"""An adapter re-fitted for another version of its base: fitted right, measured, and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapterhub.cards.formats import in_figures
from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.lowrank import nearest_for_inputs, nearest_of_rank, root_of_moment
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.moments import group_layers, second_moments
from adapterhub.packaging.release import Release
from adapterhub.packaging.retarget import check_refittable, read_retarget, refit_layers
from adapterhub.packaging.variants import open_variant

RunCli = Callable[..., tuple[int, str, str]]
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="session")
def stored_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as ``save_pretrained`` of an FP4 model writes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("stored") / "tiny-fp4"
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def loaded_weight(folder: Path, **arguments: object) -> torch.Tensor:
    """What bitsandbytes itself makes of the layer."""
    from transformers import AutoModelForCausalLM

    from adapterhub.packaging.survival import weights_in

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **arguments)
    return weights_in(model)(LAYER)


def test_the_weights_are_those_that_a_loaded_model_computes_with(tiny_base: Path, stored_base: Path) -> None:
    from transformers import BitsAndBytesConfig

    stored = open_variant(stored_base, None)
    assert stored.quantization == Quantization(type="fp4", double=False)
    assert torch.equal(stored.weight(LAYER), loaded_weight(stored_base))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    found = open_variant(tiny_base, Quantization()).weight(LAYER)
    assert torch.equal(found, loaded_weight(tiny_base, quantization_config=nf4))
    found = open_variant(tiny_base, Quantization(type="int8", double=False)).weight(LAYER)
    int8 = loaded_weight(tiny_base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    odd = (found - int8).abs() > 1e-6  # numbers halfway between two codes, of which either will do
    assert odd.sum() <= 0.001 * odd.numel()
    torch.testing.assert_close(found, int8, rtol=0, atol=float(found.abs().max()) / 127)
    assert torch.equal(
        open_variant(tiny_base, None).weight(LAYER),
        load_file(tiny_base / "model.safetensors")[f"{LAYER}.weight"].float(),
    )


@pytest.fixture
def coarse_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base stored in NF4 with blocks of 128, as bitsandbytes' own state says it."""
    from bitsandbytes import functional as bnb
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(tiny_base, tmp_path / "coarse"))
    stored = {}
    for name, tensor in load_file(tiny_base / "model.safetensors").items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        stored[name], state = bnb.quantize_4bit(tensor, blocksize=128, quant_type="nf4")
        stored |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def test_another_block_size_is_another_version(
    tiny_release: Path, tiny_base: Path, coarse_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out = tmp_path / "moved"
    arguments = ("--base", coarse_base, "--trained-on", tiny_base, "--out", out)
    code, printed, err = run_cli("retarget", tiny_release, *arguments)
    assert code == 0, err
    assert "KL           not measured: name a --text" in printed
    lock, evidence = Release.open(out).manifest.base, read_retarget(out)
    assert lock is not None
    assert evidence is not None
    assert lock.quantization == Quantization(double=False, block_size=128, compute_dtype="float32")
    assert evidence.weighting == "none"
    assert all(0 < layer.error_after < layer.error_before for layer in evidence.layers)
    # What the new factors add to the coarse weights is nearer to the trained sum than what the old ones do.
    old, new = read_adapter(tiny_release), read_adapter(out)
    before, coarse = (open_variant(base, Quantization()).weight(LAYER) for base in (tiny_base, coarse_base))
    (a, b), (new_a, new_b) = old.load_pair(LAYER), new.load_pair(LAYER)
    wanted = before + old.pairs[LAYER].scale * b @ a
    found = coarse + new.pairs[LAYER].scale * new_b @ new_a
    (layer,) = (layer for layer in evidence.layers if layer.name == LAYER)
    assert float((found - wanted).norm() / wanted.norm()) == pytest.approx(layer.error_after, rel=1e-3)


def test_inputs_decide_what_is_nearest() -> None:
    """Of all of a rank, none is nearer as the inputs see it: not the plain one, nor any step away."""
    torch.manual_seed(0)
    matrix, inputs = torch.randn(24, 32), torch.randn(200, 32) @ torch.diag(torch.logspace(-2, 1, 32))
    root = root_of_moment(inputs.T @ inputs / len(inputs))
    b, a = nearest_for_inputs(matrix, 4, root)
    best = ((matrix - b @ a) @ root).norm()
    plain_b, plain_a = nearest_of_rank(matrix, 4)
    assert best < 0.9 * ((matrix - plain_b @ plain_a) @ root).norm()
    expected = torch.linalg.svdvals(matrix @ root)[4:].square().sum().sqrt()  # Eckart and Young
    torch.testing.assert_close(best, expected, rtol=1e-3, atol=1e-4)


def test_moments_are_those_of_the_inputs(tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(LAYER).register_forward_hook(lambda _m, given, _o: seen.append(given[0][0]))
    moments = second_moments(model, [LAYER], [[5, 6, 7], [8, 9]])
    handle.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(moments[LAYER], rows.T @ rows / 5)
    assert list(group_layers({"a": 10, "b": 10, "c": 40, "d": 10}, 800)) == [["a", "b"], ["c"], ["d"]]


def test_a_base_with_room_for_all_of_it_is_met_exactly(tiny_release: Path, tiny_base: Path) -> None:
    """From bf16 to bf16 nothing is lost: the factors' product is what it was."""
    adapter = read_adapter(tiny_release)
    base = open_variant(tiny_base, None)
    (fit,) = refit_layers(adapter, base, base, {}, [LAYER])
    a, b = adapter.load_pair(LAYER)
    torch.testing.assert_close(fit.b @ fit.a, b @ a, rtol=1e-3, atol=1e-4)
    assert fit.report.error_before == 0
    assert fit.report.error_after < 1e-4


@pytest.mark.parametrize("stored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_makes_a_release_for_the_other_base(
    tiny_release: Path, tiny_base: Path, stored_base: Path, tmp_path: Path, run_cli: RunCli, stored: bool
) -> None:
    text = tmp_path / "text.jsonl"
    rows = [{"prompt": f"{number} apples for Ann", "completion": "apples"} for number in range(8)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    to = (
        ["--base", stored_base, "--trained-on", tiny_base] if stored else ["--base", tiny_base, "--to", "fp4"]
    )
    out = tmp_path / "moved"
    code, printed, err = run_cli("retarget", tiny_release, *to, "--text", text, "--out", out)
    assert code == 0, err
    release, evidence = Release.open(out), read_retarget(out)
    release.check_files()
    assert evidence is not None
    assert (evidence.calibrated, evidence.measured, evidence.weighting) == (6, 2, "inputs")
    assert all(layer.error_after <= layer.error_before for layer in evidence.layers)
    assert evidence.as_it_was is not None
    assert evidence.refitted is not None
    kept = min(evidence.as_it_was.kl_mean, evidence.refitted.kl_mean)
    assert f"{kept:.4f} is " in printed
    lock, parent = release.manifest.base, release.manifest.parent
    assert lock is not None
    assert parent is not None
    assert lock.quantization == Quantization(type="fp4", double=not stored)
    assert parent.manifest_sha256 == Release.open(tiny_release).digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "text.jsonl", "tiny-orders"]

    assert run_cli("card", out)[0] == 0
    for name in ("README.md", "card.html"):
        card = (out / name).read_text()
        assert "Re-fitted for another base" in card
        for figures in (evidence.as_it_was, evidence.refitted):
            assert in_figures(figures.kl_mean) in card
    assert run_cli("card", out, "--check")[0] == 0

    code, printed, err = run_cli(
        "fidelity", out, out, "--text", text, "--base", stored_base if stored else tiny_base
    )
    assert code == 0, err  # loads as the manifest says
    assert "KL           0.0000" in printed


def test_what_cannot_be_retargeted_is_refused(
    tiny_release: Path, tiny_base: Path, stored_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    def tell(*args: object) -> tuple[int, str]:
        code, _out, err = run_cli("retarget", tiny_release, *args, "--out", tmp_path / "moved")
        return code, err

    code, err = tell("--base", tiny_base)
    assert (code, "is what the adapter was trained on" in err) == (3, True)
    code, err = tell("--base", stored_base)
    assert (code, "--trained-on" in err) == (3, True)
    code, err = tell("--base", stored_base, "--to", "nf4", "--trained-on", tiny_base)
    assert (code, "is stored in fp4" in err) == (3, True)
    code, err = tell("--base", tiny_base, "--to", "fp4", "--text", tmp_path / "none.jsonl")
    assert (code, "no such file" in err) == (2, True)
    (tmp_path / "few.jsonl").write_text(json.dumps({"prompt": "a pear", "completion": "pear"}) + "\n")
    code, err = tell("--base", tiny_base, "--to", "fp4", "--text", tmp_path / "few.jsonl")
    assert (code, "too few to fit on some" in err) == (2, True)
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    code, err = tell("--base", tiny_base, "--to", "fp4", "--trained-on", other)
    assert (code, "is not tiny-llama as trained on" in err) == (3, True)
    assert not (tmp_path / "moved").exists()
    adapter = Path(shutil.copytree(tiny_release, tmp_path / "dora"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_bias": True}))
    with pytest.raises(ReleaseError, match=r"cannot be re-fitted: it has lora_bias"):
        check_refittable(read_adapter(adapter))
