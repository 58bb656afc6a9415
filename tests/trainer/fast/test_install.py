"""The fast path against peft's own modules in fp32: same loss, same gradients, same training, same files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from gradients import CLOSE, assert_equal_gradients, fast_gradients, plain_gradients, trained
from peft import PeftModel
from safetensors.torch import load_file

from adapterhub.errors import TrainingError
from adapterhub.packaging.manifest import Hardware
from adapterhub.trainer.activations import Setting
from adapterhub.trainer.fast.install import FastPath, install_blocks, install_fast_path
from adapterhub.trainer.ledger import ledger
from adapterhub.trainer.plan import Plan
from adapterhub.trainer.recipe import Recipe
from adapterhub.trainer.shapes import shape_of

Make = Callable[..., Any]

RECIPE = Recipe.from_dict({"name": "r", "base": "b", "data": {"train": "t"}}, Path())


def setting(*, whole: int = 0, mlp: int = 0) -> Setting:
    return Setting(2, "adamw", "fast", recompute_all=whole, recompute_mlp=mlp)


def install(model: Any, chosen: Setting | None = None) -> FastPath:
    return install_blocks(model.get_base_model(), chosen or setting(), torch.float32, torch.device("cpu"))


def fast_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(**FastPath.prepare(inputs)).loss
    loss.backward()
    detached: torch.Tensor = loss.detach()
    return detached


def test_loss_and_gradients_are_those_of_peft(
    quantized_model: Make, packed_batch: Make, architecture: str
) -> None:
    model, inputs = quantized_model(architecture), packed_batch()
    loss, expected = plain_gradients(model, inputs)
    fast_loss, gradients = fast_gradients(model, install(model, setting(whole=1, mlp=1)), inputs)
    torch.testing.assert_close(fast_loss, loss, **CLOSE)
    assert_equal_gradients(gradients, expected)


@dataclass(frozen=True)
class Drawn:
    """A model, an adapter and a batch of sizes that nobody chose."""

    architecture: str
    config: dict[str, Any]
    rank: int
    inputs: dict[str, torch.Tensor]
    chosen: Setting


def draw(seed: int, architectures: tuple[str, ...]) -> Drawn:
    """Widths are multiples of 64, because bitsandbytes computes others wrongly on the CPU."""
    random = Random(seed)
    architecture = random.choice([name for name in architectures if "wide" not in name])
    head_dim = random.choice([8, 16, 24, 32, 64])
    kv_heads, groups = random.choice([1, 2, 4]), random.choice([1, 2, 4])
    heads = kv_heads * groups
    while heads * head_dim % 64:
        heads, kv_heads = 2 * heads, 2 * kv_heads
    layers = random.randint(1, 3)
    config = {
        "hidden_size": 64 * random.randint(1, 4), "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "intermediate_size": 64 * random.randint(1, 8),
        "num_hidden_layers": layers, "vocab_size": random.randint(65, 500),
    }  # fmt: skip
    if architecture in ("phi3", "phi3 partly rotated"):  # its projections take heads of hidden / heads
        config["hidden_size"] = heads * head_dim
    if architecture == "smollm3":
        config["no_rope_layers"] = [random.randint(0, 1) for _ in range(layers)]
    if "windows" in architecture:
        config["layer_types"] = None  # as many as there are layers, from max_window_layers
    rows = [[random.randint(1, 30) for _ in range(random.randint(1, 4))] for _ in range(random.randint(1, 3))]
    longest = max(map(sum, rows))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config["vocab_size"], (len(rows), longest), generator=generator)
    positions = [[at for length in (*row, longest - sum(row)) for at in range(length)] for row in rows]
    whole = random.randint(0, layers)
    return Drawn(
        architecture, config, random.randint(1, 12),
        {"input_ids": ids, "position_ids": torch.tensor(positions), "labels": ids.clone()},
        setting(whole=whole, mlp=random.randint(0, layers - whole)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 24))]
)
def test_loss_and_gradients_are_those_of_peft_on_random_shapes(
    quantized_model: Make, architectures: tuple[str, ...], seed: int
) -> None:
    drawn = draw(seed, architectures)
    model = quantized_model(drawn.architecture, rank=drawn.rank, **drawn.config)
    loss, expected = plain_gradients(model, drawn.inputs)
    fast_loss, gradients = fast_gradients(model, install(model, drawn.chosen), drawn.inputs)
    torch.testing.assert_close(fast_loss, loss, **CLOSE)
    assert_equal_gradients(gradients, expected)


@pytest.mark.slow
def test_gradients_in_bf16_are_as_near_to_fp32_as_pefts(
    quantized_model: Make, packed_batch: Make, architecture: str
) -> None:
    """bf16 keeps 8 bits, so rounding is 2⁻⁹ of a value and a small entry's error may be all of it: what is
    compared is ‖found − fp32‖ / ‖fp32‖ over all gradients. Seven products in each of three layers and what
    lies between them, forward and backward, are some 60 roundings: √60 · 2⁻⁹ ≈ 2⁻⁶ is allowed, or a third
    more than peft's own error where the model enlarges it.
    """
    inputs = packed_batch()
    model = quantized_model(architecture)
    _, exact = plain_gradients(model, inputs)

    def error(found: dict[str, torch.Tensor]) -> float:
        off, size = (
            torch.cat([t.flatten().double() for t in ts])
            for ts in ([found[name] - exact[name] for name in exact], list(exact.values()))
        )
        return float(off.norm() / size.norm())

    plain = quantized_model(architecture, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = plain_gradients(plain, inputs)
    fast_model = quantized_model(architecture, dtype=torch.bfloat16)
    fast = install_blocks(
        fast_model.get_base_model(), setting(whole=1, mlp=1), torch.bfloat16, torch.device("cpu")
    )
    _, ours = fast_gradients(fast_model, fast, inputs)
    assert error(ours) < max(2**-6, 1.3 * error(theirs))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["up_proj"], ["o_proj", "down_proj", "k_proj"]])
def test_any_choice_of_modules_may_be_adapted(
    quantized_model: Make, packed_batch: Make, targets: list[str]
) -> None:
    model, inputs = quantized_model("llama", targets=targets, rank=3), packed_batch()
    _, expected = plain_gradients(model, inputs)
    _, gradients = fast_gradients(model, install(model), inputs)
    assert_equal_gradients(gradients, expected)


def test_gradients_add_up_over_micro_batches(quantized_model: Make, packed_batch: Make) -> None:
    model = quantized_model("llama")
    batches = [packed_batch(seed=seed) for seed in (1, 2)]
    for inputs in batches:
        _, expected = plain_gradients(model, inputs)
    fast = install(model)
    for inputs in batches:
        model(**FastPath.prepare(inputs)).loss.backward()
    found = {name: fast.flat.gradient_view(parameter) for name, parameter in trained(model).items()}
    assert_equal_gradients(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_kept_weights_change_no_gradient_and_follow_the_adapter(
    quantized_model: Make, packed_batch: Make, dropout: float
) -> None:
    """Two micro-batches a step, over three steps, then weights that were loaded: bit for bit as without."""
    steps: dict[int, list[torch.Tensor]] = {}
    for kept in (0, 2):
        model = quantized_model("llama", dropout=dropout)
        chosen = replace(setting(mlp=1), kept_weights=kept)
        fast = install(model, chosen)
        first = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
        optimizer = fast.optimizer(RECIPE, chosen)
        found = steps.setdefault(kept, [])
        torch.manual_seed(11)
        for _ in range(3):
            for seed in (1, 2):
                found.append(fast_loss(model, packed_batch(seed=seed)))
            found.append(fast.flat.gradient.clone())
            optimizer.step()
        model.eval()
        found.append(model(**FastPath.prepare(packed_batch())).loss.detach())
        model.load_state_dict(first, strict=False)
        found.append(model(**FastPath.prepare(packed_batch())).loss.detach())
    assert all(torch.equal(*pair) for pair in zip(steps[0], steps[2], strict=True))
    assert steps[2][-1] != steps[2][-2]


@pytest.mark.parametrize("chosen", [(0, 0), (0, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_gradient(
    quantized_model: Make, packed_batch: Make, chosen: tuple[int, int], dropout: float
) -> None:
    inputs = packed_batch()
    results = []
    for whole, mlp in ((0, 0), chosen):
        model = quantized_model("llama", dropout=dropout)
        fast = install(model, setting(whole=whole, mlp=mlp))
        torch.manual_seed(7)
        results.append(fast_gradients(model, fast, inputs))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[1][1].items():
        assert torch.equal(gradient, results[0][1][name]), name


def test_dropout_is_drawn_from_the_seed_and_keeps_the_mean(quantized_model: Make, packed_batch: Make) -> None:
    """The mean over masks of what one adapted linear computes is what it computes without dropout.

    A later layer is not linear in its input, so only the first product is looked at; 400 masks of 64
    features leave a standard error of at most 1/20 of one mask's deviation, four of which are allowed.
    """
    model = quantized_model("llama", dropout=0.25)
    fast = install(model)
    inputs = FastPath.prepare(packed_batch())
    torch.manual_seed(3)
    first = model(**inputs).loss
    second = model(**inputs).loss
    torch.manual_seed(3)
    assert model(**inputs).loss == first
    assert second != first

    group = fast.blocks[0].qkv
    x = torch.randn(5, 64)
    products = fast.blocks[0].engine.products
    drawn = torch.stack([products.forward(group, x, seed) for seed in range(0, 400 * 16, 16)])
    error = drawn.std(0) / 400**0.5
    assert (
        (drawn.mean(0) - products.forward(group, x, None)).abs() <= 4 * error + 1e-5
    ).float().mean() > 0.999
    model.eval()
    evaluated = model(**inputs).loss
    assert evaluated == model(**inputs).loss


def test_evaluation_keeps_nothing_and_sums_over_tokens(quantized_model: Make, packed_batch: Make) -> None:
    model, inputs = quantized_model("llama", dropout=0.5), packed_batch()
    model.eval()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).loss
        install(model, setting(whole=3))
        total = model(**FastPath.prepare(inputs), num_items_in_batch=1).loss
    kept = int((inputs["labels"][:, 1:] != -100).sum())
    assert not total.requires_grad
    torch.testing.assert_close(total / kept, expected, **CLOSE)


@pytest.mark.slow
def test_fifty_steps_train_as_peft_with_torchs_adamw(quantized_model: Make, packed_batch: Make) -> None:
    """Side by side: every loss within 1e-4 of the other's.

    Adam divides by the gradient's own size, so a relative error of 6e-5 in a gradient stays one in the
    step; fifty steps that all erred the same way would move a weight by 50 · 6e-5 of one step.
    """
    batches = [packed_batch(seed=seed % 5) for seed in range(50)]
    plain = quantized_model("llama")
    adamw = torch.optim.AdamW(trained(plain).values(), lr=2e-3, weight_decay=0.01)
    expected = []
    for inputs in batches:
        loss = plain(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(plain).values(), 0.3)
        adamw.step()
        adamw.zero_grad()
        expected.append(float(loss))

    model = quantized_model("llama")
    fast = install(model, setting(mlp=1))
    chosen = Recipe.from_dict(
        {
            "name": "r",
            "base": "b",
            "data": {"train": "t"},
            "training": {"learning_rate": 2e-3, "weight_decay": 0.01, "max_grad_norm": 0.3},
        },
        Path(),
    )
    optimizer = fast.optimizer(chosen, setting())
    losses = []
    for inputs in batches:
        loss = model(**FastPath.prepare(inputs)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_peft_would_save_and_is_loaded_back(
    quantized_model: Make, packed_batch: Make, tmp_path: Path
) -> None:
    plain, model = quantized_model("llama"), quantized_model("llama")
    fast = install(model)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "fast")
    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "fast" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert (tmp_path / "fast" / "adapter_model.safetensors").stat().st_size == (
        tmp_path / "plain" / "adapter_model.safetensors"
    ).stat().st_size

    inputs = FastPath.prepare(packed_batch())
    before = model(**inputs).loss
    with torch.no_grad():
        fast.flat.master.mul_(0.5)
    fast.flat.refresh()
    assert model(**inputs).loss != before
    model.load_adapter(tmp_path / "fast", "default", is_trainable=True)
    assert model(**inputs).loss == before


def test_without_the_fast_path_the_model_is_pefts_again(quantized_model: Make, packed_batch: Make) -> None:
    model, inputs = quantized_model("qwen2"), packed_batch()
    expected, _ = plain_gradients(model, inputs)
    fast = install(model)
    assert isinstance(model, PeftModel)
    torch.testing.assert_close(model(input_ids=inputs["input_ids"]).logits.shape, torch.Size([2, 24, 300]))
    fast.remove()
    for parameter in trained(model).values():
        parameter.grad = None
    loss, gradients = plain_gradients(model, inputs)
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert all(gradient is not None for gradient in gradients.values())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in trained(model).values())


def test_a_model_that_was_moved_is_not_trained_on_stale_weights(
    quantized_model: Make, packed_batch: Make
) -> None:
    model = quantized_model("llama")
    install(model)
    for parameter in trained(model).values():
        parameter.data = parameter.data.double()
    with pytest.raises(TrainingError, match="moved"):
        model(**FastPath.prepare(packed_batch()))


def made_plan(recipe: Recipe) -> Plan:
    shape = shape_of(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 300,
        }
    )
    hardware = Hardware(device="cpu", name="x", memory_bytes=2**34)
    return Plan(shape, hardware, setting(), ledger(shape, recipe, hardware, setting()), 2, 0, ())


@pytest.mark.parametrize("reason", ["lm_head", "attention_dropout"])
def test_what_it_cannot_train_is_refused_in_words(quantized_model: Make, reason: str) -> None:
    recipe = Recipe.from_dict({"name": "r", "base": "b", "data": {"train": "t"}}, Path())
    model = quantized_model("llama", targets=["q_proj", "lm_head"] if reason == "lm_head" else "all-linear")
    if reason == "attention_dropout":
        model.get_base_model().config.attention_dropout = 0.1
    with pytest.raises(TrainingError, match=reason):
        install_fast_path(model, recipe, made_plan(recipe))
