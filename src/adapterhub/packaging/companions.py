"""The files beside a merged checkpoint's weights: index, configuration, tokenizer, licences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from adapterhub.packaging.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from adapterhub.packaging.layout import quantization_config
from adapterhub.packaging.sums import SumPlan

_GENERATION = ("generation_config.json",)
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def write_companions(checkpoint: Checkpoint, plan: SumPlan, tokenizer: Path, target: Path) -> None:
    """Put everything but the shards into ``target``, so that transformers loads it alone.

    The tokenizer and its chat template come from the folder ``tokenizer``, the adapter's, when it has them
    (training may have changed them), else from the base; generation settings and licences come from the base.
    """
    if checkpoint.sharded:
        _write_json(target / INDEX_NAME, _index(checkpoint, plan))
    _write_json(target / CONFIG_NAME, _config(checkpoint, plan))
    _copy(checkpoint.folder, _GENERATION + _LICENCES, target)
    if not copy_tokenizer(tokenizer, target):
        copy_tokenizer(checkpoint.folder, target)


def copy_tokenizer(source: Path, target: Path) -> int:
    """Copy the tokenizer's files and chat templates from one folder to another, and count them."""
    return _copy(source, _TOKENIZER, target)


def _index(checkpoint: Checkpoint, plan: SumPlan) -> dict[str, object]:
    stored = [
        (part, shard.path.name)
        for shard in checkpoint.shards
        for made in plan.targets(shard)
        for part in made.stored
    ]
    files = {part.name: file for part, file in stored}
    total = sum(part.size for part, _file in stored)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}


def _config(checkpoint: Checkpoint, plan: SumPlan) -> dict[str, object]:
    """config.json with the dtype that the weights have now, under the name that the base uses for it."""
    config = dict(checkpoint.config)
    for name in [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]:
        config[name] = "bfloat16"
    if plan.updates.untied_from is not None:
        config["tie_word_embeddings"] = False
    if plan.updates.vocabulary is not None:
        config["vocab_size"] = plan.updates.vocabulary
    if plan.layout.storage != "bf16":
        config["quantization_config"] = quantization_config(plan.layout.storage)
    return config


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, patterns: Iterable[str], target: Path) -> int:
    """Copy the files that match, through links, and count them."""
    count = 0
    for path in sorted(path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        count += 1
    return count
