"""Several adapters merged into one base, beside PEFT's add_weighted_adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub.errors import BaseMismatchError, ReleaseError
from adapterhub.packaging.adapter import read_adapter
from adapterhub.packaging.combination import combine_adapters, write_combined
from adapterhub.packaging.evidence import FIDELITY, FidelityEvidence, read_evidence
from adapterhub.packaging.manifest import Quantization
from adapterhub.packaging.merge import Combination, merge_adapter
from adapterhub.packaging.quantized import through_4bit_
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def second(tiny_adapter: Path, tmp_path: Path) -> Path:
    """Another adapter of the same rank, with another scale, and no factors on one module."""
    return another(tiny_adapter, tmp_path / "second", {"lora_alpha": 5}, skip="layers.1.mlp.up_proj")


def another(adapter: Path, target: Path, settings: dict[str, Any], skip: str = " ", rank: int = 4) -> Path:
    shutil.copytree(adapter, target)
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    # By full name: PEFT draws factors for a module that the configuration names and the file lacks.
    config["target_modules"] = sorted(name for name in read_adapter(adapter).pairs if skip not in name)
    (target / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(7)
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        shape = (rank, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], rank)
        if skip not in name:
            tensors[name] = torch.randn(shape) * 0.1
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def merged_by_peft(
    base: Path, adapters: list[Path], weights: list[float], how: str, density: float, through: bool = False
) -> Any:
    """What PEFT makes of the base in float32; ``through``: its linear layers through NF4 and back before."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in model.named_modules() if through else ():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = through_4bit_(module.weight.data.to(torch.bfloat16), Quantization()).float()
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, str(number))
    names = [str(number) for number in range(len(adapters))]
    model.add_weighted_adapter(names, weights, "all", combination_type=how, density=density)
    model.set_adapter("all")
    return model.merge_and_unload().state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("onto", ["original", "trained"])
@pytest.mark.parametrize(
    ("how", "density"),
    [("cat", 1), ("linear", 1), ("ties", 0.4), ("ties", 1), ("dare_linear", 1), ("dare_ties", 1)],
)
def test_several_are_what_peft_makes_of_them(
    tiny_base: Path, tiny_adapter: Path, second: Path, tmp_path: Path, how: Any, density: float, onto: Any
) -> None:
    weights = [0.7, -0.4]
    merge_adapter(
        tiny_adapter,
        tiny_base,
        tmp_path / "out",
        onto=onto,
        combination=Combination([(second, weights[1])], weights[0], how, density),
    )
    theirs = merged_by_peft(
        tiny_base, [tiny_adapter, second], weights, how, density, through=onto == "trained"
    )
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        # Sums in float32 in another order, then rounded to bfloat16: half a step more at most.
        torch.testing.assert_close(
            tensor.float(), theirs[name].to(torch.bfloat16).float(), rtol=2**-7, atol=1e-6
        )


def test_cat_is_the_weighted_sum_of_any_ranks(tiny_adapter: Path, tmp_path: Path) -> None:
    wider = another(tiny_adapter, tmp_path / "wider", {"r": 6, "lora_alpha": 3}, rank=6)
    adapters = [read_adapter(tiny_adapter), read_adapter(wider)]
    module = "model.layers.0.mlp.down_proj"
    a, b = combine_adapters(adapters, [0.5, 2]).load_pair(module)
    (a1, b1), (a2, b2) = (adapter.load_pair(module) for adapter in adapters)
    torch.testing.assert_close(b @ a, 0.5 * 2 * b1 @ a1 + 2 * 0.5 * b2 @ a2)


def test_dare_draws_the_same_whatever_else_is_drawn(tiny_adapter: Path, second: Path) -> None:
    from peft.utils.merge_utils import dare_linear

    adapters = [read_adapter(tiny_adapter), read_adapter(second)]
    module = "model.layers.0.mlp.down_proj"
    before = torch.random.get_rng_state()
    a, _b = combine_adapters(adapters, [1, 1], combine="dare_linear", density=0.3, seed=5).load_pair(module)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again = combine_adapters(adapters, [1, 1], combine="dare_linear", density=0.3, seed=5)
    again.load_pair("model.layers.1.mlp.down_proj")
    assert torch.equal(again.load_pair(module)[0], a)
    other, _b = combine_adapters(adapters, [1, 1], combine="dare_linear", density=0.3, seed=6).load_pair(
        module
    )
    assert not torch.equal(other, a)
    # Each number is one adapter's, rescaled, or both, or none; in the mean it is the plain sum.
    factors = [adapter.load_pair(module)[0] for adapter in adapters]
    roots = torch.tensor([adapter.pairs[module].scale ** 0.5 for adapter in adapters])
    possible = torch.stack(
        [
            dare_linear(factors, roots * torch.tensor(kept), 1.0) / 0.3
            for kept in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
    )
    assert ((possible - a).abs().min(dim=0).values < 1e-5).all()
    assert 0.5 < (a == 0).float().mean() / 0.49 < 1.5


def test_threads_change_no_byte(tiny_base: Path, tiny_adapter: Path, second: Path, tmp_path: Path) -> None:
    how = Combination([(second, 0.5)], combine="dare_ties", density=0.5, seed=3)
    for threads in (1, 4):
        merge_adapter(
            tiny_adapter,
            tiny_base,
            tmp_path / str(threads),
            onto="original",
            combination=how,
            threads=threads,
        )
    one, four = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "4"))
    assert one == four


def test_the_release_names_every_adapter(
    tiny_release: Path, second: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    command = ("merge", tiny_release, "--base", tiny_base, "--to", "bf16", "--onto", "original")
    several = (
        "--with",
        f"{second}=0.25",
        "--weight",
        0.75,
        "--combine",
        "ties",
        "--density",
        0.5,
        "--no-fidelity",
    )
    code, _out, err = run_cli(*command, *several, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    merge = Release.open(tmp_path / "out").manifest.merge
    assert merge is not None
    assert (merge.weight, merge.combine, merge.density) == (0.75, "ties", 0.5)
    assert [(other.ref, other.weight) for other in merge.others] == [("second", 0.25)]


def test_several_as_one_adapter_are_what_they_are_together(tiny_adapter: Path, tmp_path: Path) -> None:
    wider = another(tiny_adapter, tmp_path / "wider", {"r": 6, "lora_alpha": 3}, "layers.1.mlp", rank=6)
    combined = combine_adapters([read_adapter(tiny_adapter), read_adapter(wider)], [0.5, -2])
    (tmp_path / "one").mkdir()
    write_combined(combined, tmp_path / "one")
    one = read_adapter(tmp_path / "one")
    assert one.pairs.keys() == combined.pairs.keys()
    assert {pair.rank for pair in one.pairs.values()} == {4, 10}
    for module, pair in one.pairs.items():
        assert pair.scale == 1
        for ours, theirs in zip(one.load_pair(module), combined.load_pair(module), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_several_are_measured_against_all_of_them_live(
    tiny_release: Path,
    second: Path,
    tiny_base: Path,
    tmp_path: Path,
    run_cli: RunCli,
    write_jsonl: Callable[[Path, list[dict]], Path],
) -> None:
    text = write_jsonl(
        tmp_path / "text.jsonl",
        [{"prompt": f"{number} apples for Ann", "completion": "apples"} for number in range(8)],
    )
    out = tmp_path / "made" / "out"
    several = ("--with", f"{second}=-0.5", "--weight", 2, "--base", tiny_base, "--held-out", text)
    command = ("merge", tiny_release, *several, "--to", "bf16", "--out", out)
    code, _printed, err = run_cli(*command, "--onto", "original", "--max-kl", "1e-9")
    assert (code, "over the limit" in err) == (3, True)
    assert list(out.parent.iterdir()) == []
    code, _printed, err = run_cli(*command, "--onto", "trained", "--max-kl", "0.001")
    assert code == 0, err
    assert list(out.parent.iterdir()) == [out]
    found = read_evidence(out, FIDELITY, FidelityEvidence)
    assert found is not None
    assert found.reference == "2 × tiny-orders@0.1.0 + -0.5 × second (cat)"
    assert found.delta_survival == pytest.approx(1, abs=0.05)
    assert run_cli("card", out)[0] == 0
    assert "2 × tiny-orders@0.1.0 + -0.5 × second (cat)" in (out / "README.md").read_text(encoding="utf-8")
    code, printed, err = run_cli("fidelity", tiny_release, out, "--text", text, "--base", tiny_base, "--json")
    assert code == 0, err
    assert json.loads(printed)["delta_survival"] is None  # one of them says nothing of their sum


def released(adapter: Path, target: Path, base: Path, **quantization: Any) -> Path:
    """The plain adapter as a release that was trained on ``base`` in other 4 bits."""
    from datetime import UTC, datetime

    from adapterhub.packaging.base import lock_base
    from adapterhub.packaging.manifest import Manifest
    from adapterhub.packaging.release import new_release

    lock = lock_base(base, name=base.name, quantization=Quantization(**quantization))
    draft = Manifest(name=target.name, version="0.1.0", created=datetime.now(UTC), base=lock)
    with new_release(target, draft) as staging:
        shutil.copytree(adapter, staging, dirs_exist_ok=True)
    return target


def test_adapters_that_saw_other_weights_are_not_added_to_them(
    tiny_release: Path, tiny_adapter: Path, second: Path, tiny_base: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    fp4 = released(second, tmp_path / "fp4", tiny_base, type="fp4")
    together = Combination([(fp4, 0.5)])
    with pytest.raises(ReleaseError, match=r"differently quantized weights .*tiny-orders: nf4, .*fp4: fp4, "):
        merge_adapter(tiny_release, tiny_base, tmp_path / "out", onto="trained", combination=together)
    report = merge_adapter(tiny_adapter, tiny_base, tmp_path / "plain", onto="trained", combination=together)
    assert report.quantization == Quantization(type="fp4")  # the one that says it
    merge_adapter(tiny_release, tiny_base, tmp_path / "original", onto="original", combination=together)
    text = tmp_path / "text.txt"
    text.write_text("Two apples for Ann, please.")
    code, _printed, err = run_cli(
        "merge", tiny_release, "--with", f"{fp4}=1", "--base", tiny_base, "--to", "bf16",
        "--onto", "original", "--held-out", text, "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, "--no-fidelity" in err) == (3, True)
    assert not (tmp_path / "out").exists()


def test_the_base_is_that_of_every_release_among_them(
    tiny_release: Path, tiny_adapter: Path, second: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "model.safetensors")
    elsewhere = released(second, tmp_path / "elsewhere", other)
    for first, words in (
        (tiny_adapter, "is not other as trained on"),
        (tiny_release, "on another base than"),
    ):
        with pytest.raises(BaseMismatchError, match=words):
            merge_adapter(
                first, tiny_base, tmp_path / "out", onto="original", combination=Combination([(elsewhere, 1)])
            )
    assert not list(tmp_path.glob("*out*"))


def test_a_module_that_one_of_them_names_and_has_not_is_refused(
    tiny_adapter: Path, second: Path, tiny_base: Path, tmp_path: Path
) -> None:
    config = json.loads((second / "adapter_config.json").read_text())
    config["target_modules"].append("wq")
    (second / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ReleaseError, match="names modules that its tensors have nothing for: wq"):
        merge_adapter(
            tiny_adapter, tiny_base, tmp_path / "out", onto="original", combination=Combination([(second, 1)])
        )


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--weight", "0.5"), 2, "--weight is about several adapters"),
        (("--with", "SECOND"), 2, "does not say what weight"),
        (("--with", "SECOND=x"), 2, "does not say what weight"),
        (("--with", "SECOND=0"), 2, "weight is zero"),
        (("--with", "SECOND=1", "--combine", "ties"), 2, "how much to keep"),
        (("--with", "SECOND=1", "--combine", "ties", "--density", "0"), 2, "keeps no share"),
        (("--with", "SECOND=1", "--density", "0.5"), 2, "cat prunes nothing"),
        (("--with", "SECOND=1", "--seed", "1"), 2, "draws nothing"),
        (("--with", "SECOND-none=1"), 5, "SECOND"),
        (("--with", "WIDER=1", "--combine", "linear"), 3, "ranks on .* are 4, 6"),
        (("--with", "DORA=1"), 3, "which cannot be combined"),
    ],
)  # fmt: skip
def test_combinations_that_make_no_sense_are_refused(
    tiny_base: Path,
    tiny_adapter: Path,
    second: Path,
    tmp_path: Path,
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    import re

    another(tiny_adapter, tmp_path / "wider", {"r": 6}, rank=6)
    dora = another(tiny_adapter, tmp_path / "dora", {"use_dora": True})
    tensors = load_file(dora / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"] = torch.ones(128)
    save_file(tensors, dora / "adapter_model.safetensors", {"format": "pt"})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    names = {"SECOND": second, "WIDER": tmp_path / "wider", "DORA": dora}
    filled = [
        re.sub(r"^(SECOND|WIDER|DORA)(?==|$)", lambda found: str(names[found[1]]), text) for text in options
    ]
    command = ("merge", tiny_adapter, "--base", tiny_base, "--to", "bf16", "--onto", "original")
    found, _out, err = run_cli(*command, "--out", tmp_path / "out", *filled)
    assert found == code, err
    assert re.search(words, err), err
    assert not list(tmp_path.glob("*out*"))
