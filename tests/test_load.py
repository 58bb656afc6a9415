"""load_adapter: from a folder to a model that answers as it was trained, and refuses what it should."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub import AdapterHubError, BaseMismatchError, ReleaseError, SignatureError, load_adapter
from adapterhub.errors import AdapterHubWarning
from adapterhub.packaging.release import Release

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def signed_release(tiny_release: Path, run_cli: Run, tmp_path: Path) -> Path:
    """The tiny release, signed by a key that this user trusts."""
    assert run_cli("keygen", tmp_path / "keys")[0] == 0
    assert run_cli("sign", tiny_release, "--key", tmp_path / "keys" / "adapterhub.key")[0] == 0
    return tiny_release


def distrust(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From now on be another user, who trusts no key."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody-else"))


def test_a_local_release_answers_with_the_trained_template(tiny_release: Path, tiny_base: Path) -> None:
    import bitsandbytes
    import torch

    model, tokenizer = load_adapter(tiny_release, base=tiny_base)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit)
    assert layer.base_layer.weight.quant_state.nested  # double quantization, as the manifest says
    assert not model.training
    assert tokenizer.chat_template == (tiny_release / "chat_template.jinja").read_text()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in model.generation_config.eos_token_id
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "two pears"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_it_computes_what_peft_computes(
    tiny_release: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    monkeypatch.setattr("adapterhub.trainer.model.arithmetic_of", lambda _device: "bfloat16")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16, quantization_config=settings)
    plain = PeftModel.from_pretrained(base, str(tiny_release)).eval()
    ours, _ = load_adapter(tiny_release, base=tiny_base)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_base_with_another_digest_is_refused_unless_the_caller_says_so(
    tiny_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + torch.tensor(1.0)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match=r"tiny-llama as trained on: model\.safetensors differs"):
        load_adapter(tiny_release, base=other)
    with pytest.raises(AdapterHubError, match="reason to allow another base is empty"):
        load_adapter(tiny_release, base=other, allow_base_mismatch=" ")
    with pytest.warns(AdapterHubWarning, match=r"model\.safetensors differs.*because: its norm was mended"):
        load_adapter(tiny_release, base=other, allow_base_mismatch="its norm was mended")


def test_a_release_of_a_local_base_asks_for_its_folder(tiny_release: Path) -> None:
    with pytest.raises(BaseMismatchError, match="local copy of tiny-llama") as caught:
        load_adapter(tiny_release)
    assert "--base" in caught.value.fix


def test_a_tampered_file_is_refused(tiny_release: Path, tiny_base: Path) -> None:
    weights = tiny_release / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SignatureError, match=r"adapter_model\.safetensors"):
        load_adapter(tiny_release, base=tiny_base)


def test_require_signed_wants_a_trusted_signature(
    tiny_release: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_cli: Run
) -> None:
    with pytest.raises(SignatureError, match="not signed"):
        load_adapter(tiny_release, base=tiny_base, require_signed=True)
    assert run_cli("keygen", tmp_path / "keys")[0] == 0
    assert run_cli("sign", tiny_release, "--key", tmp_path / "keys" / "adapterhub.key")[0] == 0
    load_adapter(tiny_release, base=tiny_base, require_signed=True)
    distrust(monkeypatch, tmp_path)
    with pytest.raises(SignatureError, match=r"no key to check|none of the"):
        load_adapter(tiny_release, base=tiny_base, require_signed=True)
    public = tmp_path / "keys" / "adapterhub.pub"
    load_adapter(tiny_release, base=tiny_base, require_signed=True, keys=[public])
    load_adapter(tiny_release, base=tiny_base)  # a stranger's signature is no obstacle where none is required


def test_a_signature_that_does_not_hold_is_always_refused(signed_release: Path, tiny_base: Path) -> None:
    """Files and manifest agree, so only the signature can tell."""
    manifest = signed_release / "adapterhub.json"
    content = json.loads(manifest.read_bytes())
    content["task"] = "Something else."
    manifest.write_text(json.dumps(content))
    with pytest.raises(SignatureError, match=r"model\.sig"):
        load_adapter(signed_release, base=tiny_base)


def test_an_adapter_that_does_not_fit_its_own_configuration_is_refused(
    tiny_adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from datetime import UTC, datetime

    from adapterhub.packaging.base import lock_base
    from adapterhub.packaging.manifest import Manifest
    from adapterhub.packaging.release import new_release

    broken = tmp_path / "broken"
    draft = Manifest(
        name="broken",
        version="0.1.0",
        created=datetime(2026, 1, 2, tzinfo=UTC),
        base=lock_base(tiny_base, name="tiny-llama"),
    )
    with new_release(broken, draft) as staging:
        for file in [*tiny_adapter.iterdir(), *tiny_base.glob("*token*"), *tiny_base.glob("chat*")]:
            shutil.copy(file, staging / file.name)
        config = json.loads((staging / "adapter_config.json").read_bytes())
        (staging / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ReleaseError, match="rank 5"):
        load_adapter(broken, base=tiny_base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, it: (name.replace("layers.1", "layers.9"), it), "the base has no model.layers.9."),
        (lambda name, it: (name, it[:, :2] if "lora_A" in name else it), "in the base and 64 × 2 here"),
    ],
)
def test_factors_that_no_layer_of_the_base_takes_are_refused(
    tiny_release: Path, tiny_base: Path, change: Callable[..., tuple[str, Any]], words: str
) -> None:
    """PEFT leaves the first out in silence."""
    from safetensors.torch import load_file, save

    name = "adapter_model.safetensors"
    changed = dict(change(*item) for item in load_file(tiny_release / name).items())
    data = save({key: tensor.contiguous() for key, tensor in changed.items()}, {"format": "pt"})
    Release.open(tiny_release).with_files({name: data})
    with pytest.raises(ReleaseError, match="does not fit the base") as error:
        load_adapter(tiny_release, base=tiny_base)
    assert words in error.value.what


def test_arguments_that_make_no_sense_are_refused(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, run_cli: Run
) -> None:
    import torch

    with pytest.raises(AdapterHubError, match="device 'mps' is not known"):
        load_adapter(tiny_release, base=tiny_base, device="mps")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(AdapterHubError, match="no CUDA device"):
            load_adapter(tiny_release, base=tiny_base, device="cuda")
    for missing in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(ReleaseError, match="no such folder"):
            load_adapter(missing)
        with pytest.raises(ReleaseError, match="no such folder"):
            load_adapter(tiny_release, base=missing)
    merged = tmp_path / "merged"
    arguments = ("--to", "bf16", "--onto", "original", "--base", tiny_base)
    assert run_cli("merge", tiny_release, *arguments, "--out", merged)[0] == 0
    with pytest.raises(ReleaseError, match="needs no base"):
        load_adapter(merged, base=tiny_base)
    model, _ = load_adapter(merged)
    assert type(model).__name__ == "LlamaForCausalLM"
    code, _, stderr = run_cli("merge", tiny_release, *arguments, "--out", tiny_release / "merged")
    assert code == 3
    assert "inside the release" in stderr


def test_one_key_needs_no_list(signed_release: Path, tiny_base: Path, tmp_path: Path) -> None:
    load_adapter(
        signed_release, base=tiny_base, require_signed=True, keys=str(tmp_path / "keys/adapterhub.pub")
    )
