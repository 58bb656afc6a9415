"""What vLLM takes of an adapter: the ranks and the parts that it serves, said before a server refuses them.

As vLLM's ``lora/peft_helper.py`` and ``config/lora.py`` check it: it reads one rank and one alpha, and knows
neither DoRA nor weights that were saved whole.
"""

from __future__ import annotations

from adapterhub.packaging.adapter import Adapter
from adapterhub.packaging.updates import some

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``max_lora_rank`` may be."""
# Linear layers of the decoders that vLLM serves adapters on; it fuses some of them by itself.
_LAYERS = {
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "lm_head",
}  # fmt: skip


def vllm_rank(rank: int) -> int | None:
    """The least ``max_lora_rank`` that serves an adapter of ``rank``; None where vLLM has none."""
    return next((limit for limit in RANKS if limit >= rank), None)


def vllm_obstacles(adapter: Adapter) -> list[str]:
    """What of ``adapter`` vLLM would refuse or compute wrong, in words; empty when it serves it."""
    config = adapter.config
    found = []
    if vllm_rank(config.r) is None:
        found.append(f"rank {config.r}: vLLM serves up to {RANKS[-1]}")
    own = [
        module
        for module, pair in adapter.pairs.items()
        if pair.rank > config.r or pair.scale != config.scale_of("")
    ]
    if own:
        found.append(f"a rank or scale of its own on {some(own)}: vLLM reads one for all")
    if config.use_dora or adapter.magnitudes:
        found.append("DoRA")
    whole = [*adapter.whole, *adapter.tokens]
    if config.modules_to_save or config.bias != "none" or whole:
        found.append(f"weights saved whole ({some(whole or config.modules_to_save or ['biases'])})")
    if adapter.embeddings:
        found.append(f"factors on embeddings ({some(adapter.embeddings)})")
    others = sorted({module.rpartition(".")[2] for module in adapter.pairs} - _LAYERS)
    if others:
        found.append(f"layers that vLLM may not adapt: {some(others)}")
    return found
