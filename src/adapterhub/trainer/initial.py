"""An adapter's first weights beyond peft's own: LoftQ's, which start from what quantization lost; and what a
release of PiSSA's needs to know of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError
from adapterhub.packaging.checkpoint import open_checkpoint
from adapterhub.packaging.lowrank import nearest_of_rank
from adapterhub.packaging.tensors import FLOATS, read_tensor

if TYPE_CHECKING:
    from peft import PeftModel


_PISSA_START = "start"


def keep_start(model: PeftModel, run: Path) -> None:
    """Save PiSSA's first A and B in the run folder, for the release to subtract; see ``pissa_start``."""
    model.save_pretrained(pissa_start(run), save_embedding_layers=False)


def pissa_start(run: Path) -> Path:
    """Where the first weights lie that peft's conversion of PiSSA to plain LoRA starts from.

    Training changed BA on W − B₀A₀; the release is [B, −B₀][A; A₀] on W, which everybody has. In 16 bits,
    both are equal but for the rounding of W − B₀A₀.
    """
    return run / _PISSA_START


def start_from_quantization_error(model: PeftModel, folder: Path) -> None:
    """Set each adapter to the best low-rank answer to its weight's quantization error: LoftQ's first step.

    For a weight W (out, in) held as Q, ``scale · B A`` becomes the rank-r matrix nearest to W − Q in the
    Frobenius norm (Li et al. 2023, LoftQ, equation 6 with Q fixed), so that the model starts nearer to the
    16-bit one. The frozen codes stay those of W alone, and the release's base the one that everybody has.
    peft's ``replace_lora_weights_loftq`` leaves out the scale, and so is right for alpha = rank only.

    ``folder`` holds the 16-bit weights that ``model`` was quantized from. Raises ReleaseError when a weight
    is not found there.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    checkpoint = open_checkpoint(folder)
    places = {entry.name: (shard, entry) for shard in checkpoint.shards for entry in shard.entries}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        quantized: Any = module.get_base_layer().weight
        place = places.get(f"{name}.weight")
        if place is None or place[1].dtype not in FLOATS:
            raise ReleaseError(
                f"{folder} holds no 16-bit tensor {name}.weight, which lora.init loftq starts from",
                "set lora.init to default, or name the 16-bit checkpoint as base",
            )
        held = dequantize_4bit(quantized.data, quantized.quant_state)
        whole = read_tensor(*place).to(held.device)
        (adapter,) = module.lora_A
        b, a = nearest_of_rank(whole.float() - held.float(), module.r[adapter])
        root = module.scaling[adapter] ** -0.5
        module.lora_A[adapter].weight.data.copy_(root * a)
        module.lora_B[adapter].weight.data.copy_(root * b)
        if module.use_dora[adapter]:  # its rows begin with the lengths that they have now
            module.lora_variant[adapter].init(module, adapter)
