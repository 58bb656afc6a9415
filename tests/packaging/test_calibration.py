"""4-bit codes chosen on text: never worse than the nearest, loadable as ever, resumed layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.errors import ReleaseError
from adapterhub.packaging.calibration import rounding
from adapterhub.packaging.calibration.calibrate import CalibrationText
from adapterhub.packaging.evidence import ROUNDING, RoundingEvidence, read_evidence
from adapterhub.packaging.merge import merge_adapter


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    import torch

    torch.manual_seed(0)
    # Few different tokens: inputs are correlated as those of real text are.
    return [torch.randint(40, 60, (48,)).tolist() for _ in range(8)]


def text_of(texts: list[list[int]], report: object = None) -> CalibrationText:
    settings = {} if report is None else {"report": report}
    return CalibrationText("text.jsonl", "0" * 64, texts, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_packed_codes_mean_to_bitsandbytes_what_they_mean_here(kind: str) -> None:
    import torch
    from bitsandbytes import functional as bnb

    torch.manual_seed(0)
    grid = rounding.read_grid(kind)
    places = torch.randint(0, len(grid.values), (6, 128))
    scales = torch.rand(12) + 0.5
    packed = rounding.pack(places, grid)
    state = bnb.QuantState(
        absmax=scales, shape=torch.Size((6, 128)), code=grid.by_code, blocksize=64, quant_type=kind,
        dtype=torch.float32,
    )  # fmt: skip
    found = bnb.dequantize_4bit(packed, state)
    assert torch.equal(found, grid.values[places] * rounding.spread(scales, (6, 128)))
    assert torch.equal(grid.by_code[rounding.unpack(packed)].view(6, 128), grid.values[places])


def test_chosen_codes_change_outputs_less_than_the_nearest() -> None:
    import torch

    torch.manual_seed(0)
    inputs = torch.randn(400, 24) @ torch.randn(24, 128) + 0.1 * torch.randn(400, 128)
    wanted, hessian = torch.randn(32, 128), inputs.T @ inputs
    grid = rounding.read_grid("nf4")
    steps = rounding.spread(rounding.stored_scales(rounding.block_scales(wanted, "nf4")), (32, 128))
    chosen = grid.values[rounding.choose_codes(wanted, hessian, steps, grid)] * steps
    nearest = grid.values[grid.nearest(wanted / steps)] * steps
    error = rounding.output_error(chosen, wanted, hessian)
    assert error < 0.5 * rounding.output_error(nearest, wanted, hessian)
    assert error == pytest.approx(float(((chosen - wanted) @ inputs.T).square().sum()), rel=1e-3)


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    import torch

    wanted, hessian = torch.randn(4, 64), torch.zeros(64, 64)
    grid = rounding.read_grid("nf4")
    steps = rounding.spread(rounding.block_scales(wanted, "nf4"), (4, 64))
    chosen = grid.values[rounding.choose_codes(wanted, hessian, steps, grid)] * steps
    assert torch.equal(chosen, grid.values[grid.nearest(wanted / steps)] * steps)


def test_aiming_makes_up_for_inputs_that_are_not_the_wanted_ones() -> None:
    import torch

    torch.manual_seed(0)
    wanted_inputs = torch.randn(500, 32)
    inputs = wanted_inputs @ (torch.eye(32) + 0.1 * torch.randn(32, 32))
    weight = torch.randn(8, 32)
    outputs = wanted_inputs @ weight.T
    aimed = rounding.aim(weight, inputs.T @ inputs, (outputs - inputs @ weight.T).T @ inputs)
    assert (inputs @ aimed.T - outputs).norm() < 0.1 * (inputs @ weight.T - outputs).norm()


@pytest.mark.parametrize(
    ("storage", "onto"),
    [("nf4", "trained"), ("nf4", "original"), pytest.param("fp4", "original", marks=pytest.mark.slow)],
)
def test_a_calibrated_merge_loads_plainly_and_is_nowhere_worse(
    storage: str, onto: str, tiny_release: Path, tiny_base: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from adapterhub.packaging.fidelity import compare_models
    from adapterhub.packaging.survival import weights_in

    settings = {"onto": onto, "storage": storage}
    wanted, nearest, out = tmp_path / "wanted", tmp_path / "nearest", tmp_path / "out"
    merge_adapter(tiny_release, tiny_base, wanted, onto=onto)  # type: ignore[arg-type]
    merge_adapter(tiny_release, tiny_base, nearest, **settings)  # type: ignore[arg-type]
    report = merge_adapter(tiny_release, tiny_base, out, calibration=text_of(texts), **settings)  # type: ignore[arg-type]
    assert report.rounding is not None
    assert len(report.rounding.weights) == report.quantized == 14
    assert all(error.chosen <= error.nearest for error in report.rounding.weights)
    assert read_evidence(out, ROUNDING, RoundingEvidence) == report.rounding
    assert report.release is not None
    assert report.release.manifest.merge.rounding == "calibrated"  # type: ignore[union-attr]
    report.release.check_files()
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for folder in (wanted, nearest, out)
    ]
    dense = weights_in(models[2])("model.layers.1.mlp.down_proj")
    assert torch.isfinite(dense).all()
    kl = [compare_models(models[0], model, texts).kl_mean for model in models[1:]]
    assert kl[1] < kl[0]


def test_where_no_better_codes_are_found_the_nearest_are_kept(
    tiny_release: Path,
    tiny_base: Path,
    texts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All are made bad on purpose: what is left is the checkpoint of rounding to nearest, and it is said."""
    import torch

    from adapterhub.commands.merging import _tell_measured

    settings = {"onto": "original", "storage": "nf4"}
    merge_adapter(tiny_release, tiny_base, tmp_path / "nearest", **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(
        "adapterhub.packaging.calibration.calibrate.choose_codes",
        lambda wanted, *_others: torch.zeros(wanted.shape, dtype=torch.int64),
    )
    report = merge_adapter(
        tiny_release,
        tiny_base,
        tmp_path / "out",
        calibration=text_of(texts),
        **settings,  # type: ignore[arg-type]
    )
    assert report.rounding is not None
    assert all(error.chosen == error.nearest for error in report.rounding.weights)
    out, nearest = (tmp_path / name / "model.safetensors" for name in ("out", "nearest"))
    assert out.read_bytes() == nearest.read_bytes()
    _tell_measured(report.rounding, None)
    assert "nearest      kept in 14 of 14 tensors: no better was found" in capsys.readouterr().out


def test_training_weights_alone_stay_what_they_are(
    tiny_release: Path, tiny_base: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    """Without an update the wanted weights are on the grid of training's scales: nothing is lost."""
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((tiny_release / name).read_bytes())
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: value * (0 if "lora_B" in name else 1) for name, value in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    report = merge_adapter(
        adapter, tiny_base, tmp_path / "out", onto="trained", storage="nf4", calibration=text_of(texts)
    )
    assert report.rounding is not None
    assert max(error.chosen for error in report.rounding.weights) < 1e-3


@pytest.mark.slow
def test_an_interrupted_choice_goes_on_at_its_layer(
    tiny_release: Path, tiny_base: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    settings = {"onto": "original", "storage": "nf4", "threads": 1}
    whole, out = tmp_path / "whole", tmp_path / "out"
    merge_adapter(tiny_release, tiny_base, whole, calibration=text_of(texts), **settings)  # type: ignore[arg-type]

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(tiny_release, tiny_base, out, calibration=text_of(texts, interrupt), **settings)  # type: ignore[arg-type]
    assert not out.exists()
    finished = tmp_path / ".out.partial" / "scratch" / "0.safetensors"
    before = finished.stat().st_mtime_ns
    done: list[int] = []

    def note(number: int, _total: int) -> None:
        done.append(number)
        if number == 1:
            assert finished.stat().st_mtime_ns == before  # taken as it was

    merge_adapter(tiny_release, tiny_base, out, calibration=text_of(texts, note), **settings)  # type: ignore[arg-type]
    assert done == [1, 2]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / ".out.partial").exists()


def test_other_text_begins_anew(
    tiny_release: Path, tiny_base: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", {"onto": "original", "storage": "nf4"}

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_adapter(tiny_release, tiny_base, out, calibration=text_of(texts, interrupt), **settings)  # type: ignore[arg-type]
    report = merge_adapter(tiny_release, tiny_base, out, calibration=text_of(texts[:3]), **settings)  # type: ignore[arg-type]
    assert report.rounding is not None
    assert report.rounding.texts == 3


def test_only_four_bits_have_codes_to_choose(
    tiny_release: Path, tiny_base: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    with pytest.raises(ReleaseError, match="no codes to choose"):
        merge_adapter(
            tiny_release, tiny_base, tmp_path / "out", onto="original", storage="int8",
            calibration=text_of(texts),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_journal_names_no_text(texts: list[list[int]]) -> None:
    from adapterhub.packaging.calibration.calibrate import note_text

    assert note_text(None) == {}
    assert len(json.dumps(note_text(text_of(texts)))) < 100
