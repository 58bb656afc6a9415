"""The planner: what it chooses fits and is explained, and what does not fit has a way out; the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.errors import RecipeError, TrainingError
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.hardware import described_gpu, detect_hardware, parse_size
from adapterhub.trainer.ledger import GIB, ledger
from adapterhub.trainer.plan import plan, plan_for, plan_with_less
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import ModelShape, shape_of

LLAMA = {"model_type": "llama", "vocab_size": 32000}
SIZES = {
    "135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "intermediate_size": 1536,
    },
    "7b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
    },
    "65b": {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 22016,
    },
}
HOST = Hardware(device="cpu", name="a processor", memory_bytes=16 * GIB, count=2)


def shape(size: str) -> ModelShape:
    return shape_of({**LLAMA, **SIZES[size]})


def recipe(*overrides: str) -> Recipe:
    content: dict[str, Any] = {"name": "r", "base": "b", "data": {"train": "t"}, "lora": {"rank": 64}}
    return Recipe.from_dict(content, Path(), overrides=overrides)


def test_a_7b_runs_without_recomputing_on_48_gib() -> None:
    made = plan_for(recipe("data.max_length=2048"), shape("7b"), described_gpu(48 * GIB))
    assert (made.setting.recompute_all, made.setting.recompute_mlp) == (0, 0)
    assert made.micro_batch * made.accumulation == 16
    assert made.micro_batch >= 2
    assert not made.gradient_checkpointing


def test_what_is_left_keeps_weights_dequantized() -> None:
    made = plan_for(recipe("data.max_length=2048"), shape("7b"), described_gpu(48 * GIB))
    kept = made.setting.kept_weights
    assert made.accumulation > 1
    assert 0 < kept <= 32
    assert any(line.name == "kept weights" for line in made.ledger.parts)
    assert any(choice.name == "weights kept in bf16" for choice in made.choices)
    more = plan_for(recipe("data.max_length=2048"), shape("7b"), described_gpu(40 * GIB))
    assert more.micro_batch < made.micro_batch or more.setting.kept_weights < kept
    for changed in ("lora.dropout=0.1", "training.batch_size=1"):
        without = plan_for(recipe("data.max_length=2048", changed), shape("7b"), described_gpu(48 * GIB))
        assert without.setting.kept_weights == 0


def test_a_65b_fits_48_gib_by_recomputing_and_paging() -> None:
    made = plan_for(recipe(), shape("65b"), described_gpu(48 * GIB))
    assert made.setting.recompute_all > 0
    assert made.optimizer == "paged_adamw_32bit"
    assert made.predicted_peak_bytes + made.reserve_bytes <= 48 * GIB


def test_inputs_are_offloaded_where_that_makes_room_for_more_rows() -> None:
    """A 65B at 2,048 tokens: rows share each weight's dequantization, and their inputs wait on the host."""
    made = plan_for(recipe("data.max_length=2048"), shape("65b"), described_gpu(48 * GIB))
    assert made.setting.offload
    assert made.micro_batch >= 4
    waiting = [line for line in made.ledger.parts if line.name == "saved inputs"]
    assert [line.on for line in waiting] == ["host"]
    assert made.ledger.host_bytes <= made.hardware.memory_bytes
    (choice,) = [choice for choice in made.choices if choice.name == "offloading"]
    assert choice.value == f"inputs of {made.setting.recompute_all} layers"
    assert f"{waiting[0].bytes / GIB:.2f} GiB wait in host memory" in choice.why


def test_every_choice_is_explained() -> None:
    made = plan_for(recipe("data.max_length=2048"), shape("7b"), described_gpu(48 * GIB))
    assert [choice.name for choice in made.choices] == [
        "micro-batch", "accumulation", "recomputation", "offloading", "optimizer", "engine",
        "weights kept in bf16",
    ]  # fmt: skip
    paged = plan_for(recipe(), shape("65b"), described_gpu(48 * GIB))
    why = {choice.name: choice.why for choice in paged.choices}
    assert "5.96 GiB, leave the card" in why["optimizer"]  # 8 B each of 799,539,200 parameters


@given(
    size=st.sampled_from(["7b", "65b"]),
    gib=st.integers(4, 160),
    length=st.sampled_from([256, 512, 2048, 8192]),
    batch=st.sampled_from([1, 6, 16]),
    cpu=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_plan_fits_or_says_what_would_have_to_give(
    size: str, gib: int, length: int, batch: int, cpu: bool
) -> None:
    hardware = Hardware(device="cpu", name="x", memory_bytes=gib * GIB) if cpu else described_gpu(gib * GIB)
    wanted = recipe(f"data.max_length={length}", f"training.batch_size={batch}")
    made = plan(shape(size), wanted, hardware)
    needed = made.predicted_peak_bytes - made.ledger.reclaimable_bytes + made.reserve_bytes
    assert made.fits == (needed <= hardware.memory_bytes)
    assert made.micro_batch * made.accumulation == batch
    assert made.ledger == ledger(shape(size), wanted, hardware, made.setting)
    assert all(choice.why for choice in made.choices)
    assert not made.fits or not made.remedies
    if not made.fits and made.setting.engine == "fast":  # then what is said to be needed is the least
        other = replace(made.setting, offload=not made.setting.offload)
        found = ledger(shape(size), wanted, hardware, other)
        held = found.host_bytes <= hardware.memory_bytes
        assert not held or found.predicted_peak_bytes >= made.predicted_peak_bytes
    assert all(remedy.peak_bytes - made.ledger.reclaimable_bytes <= gib * GIB for remedy in made.remedies)


def test_more_memory_never_recomputes_more_at_the_same_micro_batch() -> None:
    wanted = recipe("data.max_length=2048", "training.micro_batch=4")
    recomputed = []
    for gib in (12, 16, 20, 24, 32, 48):
        made = plan(shape("7b"), wanted, described_gpu(gib * GIB))
        assert made.micro_batch == 4
        recomputed.append((made.setting.recompute_all, made.setting.recompute_mlp))
    weights = [3 * whole + mlp for whole, mlp in recomputed]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > weights[-1] == 0


def test_what_the_recipe_fixes_is_kept() -> None:
    wanted = recipe(
        "training.micro_batch=2",
        "training.optimizer=paged_adamw_8bit",
        "training.gradient_checkpointing=true",
    )
    made = plan(shape("7b"), wanted, described_gpu(48 * GIB))
    assert made.micro_batch == 2
    assert made.optimizer == "paged_adamw_8bit"
    assert made.setting.recompute_all == 32


def test_what_does_not_fit_is_an_error_with_each_way_out_tried() -> None:
    wanted = recipe("data.max_length=8192", "training.gradient_checkpointing=false")
    made = plan(shape("7b"), wanted, described_gpu(12 * GIB))
    assert not made.fits
    assert {remedy.change for remedy in made.remedies} >= {"training.gradient_checkpointing auto"}
    fixed = recipe("data.max_length=8192")
    assert plan(shape("7b"), fixed, described_gpu(12 * GIB)).fits
    with pytest.raises(TrainingError, match="does not fit") as caught:
        plan_for(wanted, shape("7b"), described_gpu(12 * GIB))
    assert "gradient_checkpointing auto" in caught.value.fix
    assert "at least" in caught.value.fix


def test_length_and_rank_give_together_what_neither_gives_alone() -> None:
    wanted = recipe("data.max_length=8192", "lora.rank=256")
    made = plan(shape("7b"), wanted, described_gpu(6 * GIB))
    (both,) = [remedy for remedy in made.remedies if remedy.change.startswith("data.max_length")]
    assert both.change == "data.max_length 1024 with lora.rank 32"
    assert both.max_length == 1024
    less = recipe("data.max_length=1024", "lora.rank=32")
    assert plan(shape("7b"), less, described_gpu(6 * GIB)).fits
    for alone in ("data.max_length=1024", "lora.rank=32"):
        changed = recipe("data.max_length=8192", "lora.rank=256", alone)
        assert not plan(shape("7b"), changed, described_gpu(6 * GIB)).fits


def test_after_an_out_of_memory_less_is_planned_until_nothing_is_left_to_give() -> None:
    """Also where a run needs less than the reserve of a large card."""
    small = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model, gpu = shape_of({**small, "num_attention_heads": 4}), described_gpu(141 * GIB)
    long = recipe("data.max_length=4096")
    current, peaks, refusal = plan(model, long, gpu), [], None
    assert current.predicted_peak_bytes < current.reserve_bytes
    while refusal is None and len(peaks) < 200:
        peaks.append(current.predicted_peak_bytes)
        try:
            current = plan_with_less(current, long)
        except TrainingError as err:
            refusal = err
        assert current.hardware == gpu
    assert refusal is not None
    assert "than its 141.00 GiB" in str(refusal)
    assert len(peaks) > 1
    assert peaks == sorted(set(peaks), reverse=True)


def test_a_device_that_is_said_to_be_large_enough_is() -> None:
    with pytest.raises(TrainingError) as caught:
        plan_for(recipe(), shape("65b"), described_gpu(24 * GIB))
    gib = int(caught.value.fix.rpartition("at least ")[2].removesuffix(" GiB"))
    assert plan(shape("65b"), recipe(), described_gpu(gib * GIB)).fits
    assert not plan(shape("65b"), recipe(), described_gpu((gib - 1) * GIB)).fits


def test_the_cpu_gets_enough_tokens_and_no_more() -> None:
    small = shape_of({**LLAMA, **SIZES["135m"], "num_key_value_heads": 3, "tie_word_embeddings": True})
    assert plan(small, recipe("data.max_length=128"), HOST).micro_batch == 4
    assert plan(small, recipe("data.max_length=512"), HOST).micro_batch == 1
    assert plan(small, recipe("data.max_length=64", "training.batch_size=4"), HOST).micro_batch == 4


@pytest.mark.parametrize(
    ("model", "overrides", "engine", "words"),
    [
        ({"model_type": "gemma2"}, [], "linears", "architecture gemma2"),
        ({"model_type": "gemma3_text"}, [], "linears", "architecture gemma3_text"),
        ({"hidden_act": "relu"}, [], "linears", "activation relu"),
        ({"attention_dropout": 0.1}, [], "linears", "attention_dropout"),
        ({"head_dim": 36}, [], "linears", "heads of 36 features"),
        ({"head_dim": 512}, [], "linears", "heads of 512 features"),
        ({}, ["quantization.compute_dtype=float32"], "linears", "float32"),
        ({"intermediate_size": 1001}, [], "plain", "mlp.down_proj has 1001"),
        ({}, ["quantization.type=int8"], "plain", "4-bit"),
        ({}, ["quantization=null"], "plain", "4-bit"),
        ({}, ["lora.dora=true"], "plain", "DoRA"),
        ({}, ["lora.new_tokens=['<a>']"], "plain", "rows of embeddings"),
    ],
)
def test_what_the_fast_path_has_no_layer_for_is_planned_for_another_engine(
    model: dict[str, Any], overrides: list[str], engine: str, words: str
) -> None:
    """The planner must know: training would refuse what an engine cannot do, with no way out."""
    made = plan(shape_of({**LLAMA, **SIZES["7b"], **model}), recipe(*overrides), described_gpu(48 * GIB))
    assert made.setting.engine == engine
    (choice,) = [choice for choice in made.choices if choice.name == "engine"]
    assert words in choice.why


def test_a_base_with_a_vision_tower_is_planned_plain() -> None:
    text = {**SIZES["135m"], "model_type": "gemma3_text"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    gemma = shape_of({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    made = plan(gemma, recipe(), described_gpu(48 * GIB))
    assert made.setting.engine == "plain"
    assert any("vision tower" in choice.why for choice in made.choices)


@pytest.mark.parametrize("tower", [True, False])
def test_several_processes_do_not_wait_for_gradients_of_an_idle_tower(tmp_path: Path, tower: bool) -> None:
    """With text alone its adapters get none; not told so, DDP fails in the second step."""
    from adapterhub.trainer.arguments import training_arguments

    text = {**SIZES["135m"], "model_type": "gemma3_text"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    gemma = {"model_type": "gemma3", "text_config": text, "vision_config": vision if tower else None}
    made = plan(shape_of(gemma), recipe(), HOST)
    arguments = training_arguments(recipe(), made, HOST, 20, tmp_path)
    assert arguments.ddp_find_unused_parameters == tower


def test_gemmas_older_name_for_its_activation_is_no_obstacle() -> None:
    gemma = shape_of({**LLAMA, **SIZES["7b"], "model_type": "gemma", "hidden_act": "gelu"})
    assert plan(gemma, recipe(), described_gpu(48 * GIB)).setting.engine == "fast"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("48GiB", 48 * GIB),
        ("24GB", 24 * 10**9),
        ("80g", 80 * GIB),
        (" 1.5 TiB ", 1536 * GIB),
        ("1024B", 1024),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "48", "GiB", "-1GiB", "0g", "48 GiB of memory", "1e9", "99999999999TiB", "４８GiBx"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="size of memory"):
        parse_size(text)


def test_this_machine_has_a_name_and_memory() -> None:
    found = detect_hardware()
    assert found.name
    assert found.memory_bytes > GIB // 4
    assert found.count >= 1


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **SIZES["7b"]}))
    return folder


def test_the_command_prints_one_document(
    config_folder: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run_cli(
        "plan", config_folder, "--gpu", "48GiB", "--json", "--set", "data.max_length=2048"
    )
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["fits"] is True
    assert document["model"]["parameters"] == 6_738_415_616
    on_device = sum(part["bytes"] for part in document["ledger"] if part["on"] == "device")
    assert on_device == document["predicted_peak_bytes"]


def test_the_command_shows_a_table_and_exits_6_when_nothing_fits(
    config_folder: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = run_cli("plan", config_folder, "--gpu", "48GiB")
    assert code == 0
    assert "base codes" in out
    assert "fits" in out
    code, out, err = run_cli("plan", config_folder, "--gpu", "3GB")
    assert code == 6
    assert "base codes" in out
    assert "does not fit" in err
    assert "LLaMA's 1B shape fits" in err


def test_the_command_plans_a_recipe_for_its_own_base(
    config_folder: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: r\nbase: base\ndata: {train: rows.jsonl, max_length: 1024}\nlora: {rank: 8}\n")
    code, out, _ = run_cli("plan", path, "--gpu", "24GB", "--json")
    assert code == 0
    formulas = {part["name"]: part["formula"] for part in json.loads(out)["ledger"]}
    assert formulas["adapter weights"].startswith("rank 8:")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such file"),
        (["recipe.yaml"], "no such file"),
        (["--gpu", "many", "base"], "size of memory"),
        (["base", "--gpu", "48GiB", "--set", "lora.rang=3"], "lora.rank"),
        (["base", "--gpu", "48GiB", "--set", "lora.target_modules=[q_prj]"], "q_prj"),
        (["base/config.json", "--gpu", "48GiB"], "config.json"),
        (["base", "--gpu", "48"], "size of memory"),
        (["base", "--gpu", "48GiB", "--reserve", "48GiB"], "leaves nothing"),
        (["base", "--gpu", "48GiB", "--data", "nothere.jsonl"], "nothere.jsonl: no such file"),
        (["base", "--gpu", "48GiB", "--set", "lora.init=pissa"], "plan: lora.init pissa changes the base"),
    ],
)
def test_the_command_names_what_it_cannot_use(
    config_folder: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(config_folder.parent)
    code, out, err = run_cli("plan", *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert not out


def test_planning_for_a_card_does_not_import_torch(config_folder: Path) -> None:
    program = (
        "import sys; from adapterhub.cli import main; "
        "code = main(sys.argv[1:]); print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    arguments = ["plan", str(config_folder), "--gpu", "48GiB", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "False"
