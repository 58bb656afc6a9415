"""The frozen base in 4 bits and the adapter on it."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.errors import RecipeError, ReleaseError, TrainingError
from adapterhub.packaging.base import weight_files
from adapterhub.packaging.manifest import Quantization
from adapterhub.trainer.arithmetic import arithmetic_of, compute_in_float32
from adapterhub.trainer.recipe import LoraSection
from adapterhub.trainer.vocabulary import trained_rows

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Device = Literal["cpu", "cuda"]

# On import bitsandbytes advises a kernel that has no backward, so training could not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# In each product of an LLM.int8() layer it says that inputs are cast to float16: on the CPU they always are.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
# It orders checkpoints by their number where it does not trust file times: as it should, without a word.
logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, with a pad token. Raises ReleaseError when none can be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as err:
        raise ReleaseError(
            f"{folder} holds no tokenizer that transformers can read ({_first_line(err)})",
            "copy the base's tokenizer files into it",
        ) from err
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: padding is marked by position, see packing.collate
    return tokenizer


def load_base(
    folder: Path, quantization: Quantization | None, device: Device, *, divisible: bool = False
) -> PreTrainedModel:
    """The base model in ``folder`` on ``device``: frozen, linear layers quantized, everything else in bf16.

    ``divisible``: 4-bit codes are stored as bf16 numbers, which FSDP can divide.
    QLoRA section 3: NF4 codes with double-quantized scales, dequantized to the compute dtype in each product.
    On a processor without bfloat16 instructions the same weights compute in float32.
    A folder whose files are quantized already is loaded as they are.
    Raises ReleaseError when the folder is not a checkpoint that transformers knows, TrainingError when it
    does not fit.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    weight_files(folder)  # refuses pickles and empty folders in our own words
    arguments: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "device_map": {"": torch.cuda.current_device() if device == "cuda" else "cpu"},
    }
    if quantization is not None and not _is_quantized(folder):
        arguments["quantization_config"] = _bitsandbytes(quantization, divisible=divisible)
    try:
        with _quiet_loading():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=False, **arguments
            )
    except torch.OutOfMemoryError as err:
        raise TrainingError(
            f"{folder} does not fit on the device: {_first_line(err)}",
            "see `adapterhub plan` for what fits; choose a smaller base",
        ) from err
    except (OSError, ValueError, KeyError, SafetensorError) as err:
        raise ReleaseError(
            f"{folder} is not a checkpoint that transformers can load: {_first_line(err)}",
            "name a folder that holds config.json and *.safetensors of a causal language model",
        ) from err
    if device == "cpu":
        _check_rows_are_whole_blocks(model)
    if arithmetic_of(device) == "float32":
        compute_in_float32(model)
    model.requires_grad_(False)
    return model


def _is_quantized(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes()).get("quantization_config"))
    except (OSError, ValueError, AttributeError):
        return False  # transformers says what is wrong with it


def _check_rows_are_whole_blocks(model: PreTrainedModel) -> None:
    """Refuse what bitsandbytes 0.50 dequantizes wrongly on the CPU: rows that end inside a block."""
    import bitsandbytes

    for name, module in model.named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        block = module.weight.quant_state.blocksize
        if module.in_features % block:
            raise ReleaseError(
                f"{name} has {module.in_features} inputs, no multiple of {block}: "
                "bitsandbytes computes wrong 4-bit products for it on the CPU",
                "use a CUDA device, or a base in 16 bits (quantization: null)",
            )


def attach_adapter(
    model: PreTrainedModel, lora: LoraSection, *, seed: int, token_ids: Sequence[int] = ()
) -> PeftModel:
    """Put a fresh LoRA adapter on every linear layer that ``lora`` targets.

    A is drawn from ``seed``, B is zero: the model computes what the base does until the first step. With
    ``init`` pissa, A and B take the principal components out of the base's weights. ``token_ids`` are rows of
    the embeddings (and of a head of its own) that are trained whole. Adapter weights are fp32, (rank, in) and
    (out, rank) a layer. Raises RecipeError when a named target is not in the base.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    _check_targets(model, lora)
    torch.manual_seed(seed)
    targets = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="pissa" if lora.init == "pissa" else True,
        trainable_token_indices=trained_rows(model, token_ids) if token_ids else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft_model: PeftModel = get_peft_model(model, config)
    keep_codes_for_training(peft_model)
    return peft_model


def _check_targets(model: PreTrainedModel, lora: LoraSection) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    targets = lora.target_modules
    if targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        met = {name: module for name, module in model.named_modules() if re.fullmatch(targets, name)}
        wrong = [name for name, module in met.items() if not isinstance(module, (torch.nn.Linear, Conv1D))]
        if wrong:
            raise RecipeError(
                f"lora.target_modules: {targets} meets {wrong[0]}, which is no linear layer",
                r"let the pattern end in the layers' names, like .*\.layers\.[0-9]\..*_proj",
            )
        missing = [] if met else [targets]
    else:
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        raise RecipeError(
            f"lora.target_modules: the base has no module named {', '.join(missing)}",
            "use all-linear, or names that `adapterhub plan BASE --json` lists",
        )


def keep_codes_for_training(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking NF4 codes on the CPU when a model in training is evaluated.

    ``Linear4bit`` repacks its codes for an inference kernel on the first forward without gradients; that
    kernel has no backward, so every later training step would silently lose the gradient below it
    (bitsandbytes 0.50).
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' bar out of logs."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _bitsandbytes(quantization: Quantization, *, divisible: bool) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization.block_size != 64:
        raise RecipeError(
            f"quantization.block_size {quantization.block_size}: transformers quantizes in blocks of 64 only",
            "set quantization.block_size to 64",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=torch.bfloat16 if divisible else torch.uint8,
    )


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0][:200]
