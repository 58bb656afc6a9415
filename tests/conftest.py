"""Small real things to test with: a two-layer LLaMA with a tokenizer, an adapter on it, its release."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

# Before any import of the library: tests speak to loopback only, never to the user's cache or configuration.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the models are tiny: a second thread costs more than it brings

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = [
    "Two apples and three pears for Ann, please. No, make that four pears.",
    'The quick brown fox jumps over the lazy dog. 0123456789 {"item": "milk", "quantity": 2}',
    "What is the capital of France? The capital of France is Paris. system user assistant",
]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has its own configuration folder and Hub cache, which this is, and no token."""
    from huggingface_hub import constants  # reads the environment once, when it is imported

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))  # for processes that a test starts
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    (home / "hf").mkdir()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "hf" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return home / "hf" / "hub"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real instruction data beside the repository; tests that want it skip without it."""
    if not _SHARED_DATA.is_dir():
        pytest.skip("no shared data beside the repository")
    return _SHARED_DATA


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer LLaMA's folder (hidden 64, GQA, tied embeddings, bf16), with tokenizer and ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # As SmolLM2 has it: the pad token is the end token, the classic trap.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain PEFT folder: rank 4, alpha 8, all linear layers, random weights (B too: outputs change)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "plain"
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def _release_template(tiny_base: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from adapterhub.packaging.base import lock_base
    from adapterhub.packaging.manifest import Manifest, Quantization
    from adapterhub.packaging.release import new_release

    path = tmp_path_factory.mktemp("release") / "tiny-orders"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    lock = lock_base(
        tiny_base, name="tiny-llama", quantization=Quantization(), chat_template=tokenizer.chat_template
    )
    draft = Manifest(
        name="tiny-orders",
        version="0.1.0",
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        licence="apache-2.0",
        task="Turns an order in words into JSON.",
        base=lock,
        recipe={"base": "tiny-llama", "rank": 4},
        tools={"adapterhub": "0.1.0"},
    )
    with new_release(path, draft) as staging:
        for file in tiny_adapter.iterdir():
            shutil.copy(file, staging / file.name)
        tokenizer.save_pretrained(staging)
    return path


@pytest.fixture
def tiny_release(_release_template: Path, tmp_path: Path) -> Path:
    """A fresh copy of a small, sound, unsigned adapter release without evidence or card."""
    path = tmp_path / "tiny-orders"
    shutil.copytree(_release_template, path)
    return path


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``run_cli("verify", path)`` runs a command line in this process -> (exit code, stdout, stderr)."""
    from adapterhub.cli import main

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, list[dict]], Path]:
    """Write rows to a JSONL file and return its path."""

    def write(path: Path, rows: list[dict]) -> Path:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
