"""A LoRA adapter as PEFT writes it (adapter_config.json, adapter_model.safetensors), read with suspicion."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapterhub.errors import ReleaseError
from adapterhub.packaging.problems import first_problem
from adapterhub.packaging.tensors import FLOATS, TensorEntry, TensorFile, read_header, read_tensor

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_MAX_CONFIG_BYTES = 1024 * 1024
_MAX_RANK = 65536
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EMBEDDING_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<side>[AB])")
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_TOKENS = re.compile(r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
_WHOLE = re.compile(
    r"base_model\.model\.(?P<module>.+?)(\.base_layer|\.modules_to_save|\.token_adapter\.base_layer)?"
    r"\.(?P<parameter>weight|bias)"
)
# What PEFT writes beside a saved module: the base's own weights, which a merge has from the base.
_BASES_OWN = re.compile(r"base_model\.model\..+\.original_module\..+")
# Modules whose whole weights PEFT saves without being asked: when they were adapted, or resized.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")

# Settings of peft.LoraConfig that do not change what the stored factors mean.
_NEUTRAL = {
    "auto_mapping", "inference_mode", "peft_version", "task_type", "base_model_name_or_path", "revision",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "megatron_config", "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "runtime_config",
    "ensure_weight_tying", "trainable_token_indices",
}  # fmt: skip
# Ways to initialise the factors that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
# do not.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]
Alpha = Annotated[float, Field(allow_inf_nan=False)]


class AdapterConfig(BaseModel):
    """adapter_config.json, as far as it decides what the factors mean; the rest is in ``model_extra``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"]
    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, Rank] = {}
    """Module pattern to rank, where it is not ``r``."""
    alpha_pattern: dict[str, Alpha] = {}
    """Module pattern to alpha, where it is not ``lora_alpha``."""
    use_rslora: bool = False
    """Scale by alpha/√r (https://arxiv.org/abs/2312.03732) instead of alpha/r."""
    fan_in_fan_out: bool = False
    """The base stores these weights as (in, out)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    """Rows of the sum keep trained lengths (https://arxiv.org/abs/2402.09353)."""
    trainable_token_indices: dict[str, list[int]] | list[int] | None = None
    """Rows of the embeddings that were trained whole; a list stands for ``embed_tokens``."""
    target_parameters: list[str] | None = None
    target_modules: list[str] | str | None = None
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str | None = True

    def rank_of(self, module: str) -> int:
        """The rank of the factors on ``module`` (its dotted name in the base)."""
        return value_for(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """The factor s in W + s·B·A (LoRA, https://arxiv.org/abs/2106.09685, section 4.1)."""
        alpha, rank = value_for(self.alpha_pattern, module, self.lora_alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def obstacles(self) -> list[str]:
        """What in these settings cannot be merged right, in words; empty when nothing stands in the way."""
        found = []
        if self.target_parameters:
            named = ", ".join(sorted(self.target_parameters))
            found.append(f"target_parameters ({named}), which transformers fuses of several tensors")
        if self.init_lora_weights not in _PLAIN_INITS:
            found.append(f"init_lora_weights={self.init_lora_weights!r}, which changes the base too")
        extra = self.model_extra or {}
        found += [name for name, value in sorted(extra.items()) if value and name not in _NEUTRAL]
        return found

    def tokens_of(self, module: str) -> list[int]:
        """The rows of ``module`` that were trained whole; empty when none were."""
        indices = self.trainable_token_indices or {}
        named = {"embed_tokens": indices} if isinstance(indices, list) else indices
        return next((rows for name, rows in named.items() if _is_or_ends_with(module, name)), [])


@dataclass(frozen=True)
class LoraPair:
    """The two factors on one module."""

    module: str
    """Dotted name of the linear layer in the base, like ``model.layers.0.self_attn.q_proj``."""
    a: TensorEntry
    """Shape (rank, in)."""
    b: TensorEntry
    """Shape (out, rank)."""
    rank: int
    scale: float
    """s in W + s·B·A."""
    transposed: bool = False
    """The base stores the weight as (in, out): an embedding, or ``fan_in_fan_out``."""

    @property
    def out_features(self) -> int:
        return self.b.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter whose configuration and tensor headers were found sound; no tensor was read yet."""

    folder: Path
    config: AdapterConfig
    file: TensorFile
    pairs: dict[str, LoraPair]
    """By module."""
    others: tuple[str, ...]
    """Names of tensors that are no LoRA factor of a linear layer; the fields below sort them."""
    embeddings: dict[str, LoraPair]
    """Factors on embeddings, by module: A is (rank, tokens), B (width, rank)."""
    magnitudes: dict[str, TensorEntry]
    """DoRA's lengths of the rows, (out,), by module."""
    tokens: dict[str, TensorEntry]
    """Rows of embeddings that were trained whole, by module."""
    whole: dict[str, TensorEntry]
    """Tensors that take the place of the base's, by their name there."""
    unknown: tuple[str, ...]
    """Names of tensors that are none of these."""

    @property
    def parameters(self) -> int:
        """Trained numbers, all tensors."""
        return sum(math.prod(entry.shape) for entry in self.file.entries)

    def load_pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) of one module in float32.

        Raises ReleaseError when a value is NaN or infinite.
        """
        pair = self.pairs.get(module) or self.embeddings[module]
        return self.load(pair.a), self.load(pair.b)

    def load(self, entry: TensorEntry) -> torch.Tensor:
        """One tensor of the adapter in float32. Raises ReleaseError when a value is NaN or infinite."""
        import torch

        tensor = read_tensor(self.file, entry).to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise ReleaseError(
                f"{self.file.path}: {entry.name!r} holds NaN or infinite values", "train the adapter again"
            )
        return tensor


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT adapter folder: the configuration, and the tensors' headers.

    Raises ReleaseError when the weights are a pickle or missing, when the configuration is no LoRA's, or
    when a factor lacks its partner or has a shape that rank and partner do not allow.
    """
    config = _read_config(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        if (folder / PICKLE_NAME).is_file():
            raise ReleaseError(
                f"{folder / PICKLE_NAME} is a pickle, which can run code when opened",
                "turn it into safetensors: adapterhub convert FOLDER/adapter_model.bin --out DIR",
            )
        raise ReleaseError(f"{folder} holds no {WEIGHTS_NAME}", "name the folder of a PEFT adapter")
    file = read_header(weights)
    sides: dict[str, dict[str, TensorEntry]] = {}
    embedding_sides: dict[str, dict[str, TensorEntry]] = {}
    others = []
    for entry in file.entries:
        if match := _FACTOR.fullmatch(entry.name):
            sides.setdefault(match["module"], {})[match["side"]] = entry
            continue
        others.append(entry)
        if match := _EMBEDDING_FACTOR.fullmatch(entry.name):
            embedding_sides.setdefault(match["module"], {})[match["side"]] = entry
    if config.target_parameters:  # their factors stand for all experts together: no module's own pair
        others += [entry for found in sides.values() for entry in found.values()]
        sides = {}
    sorted_out = _sort_others(config, others)
    return Adapter(
        folder=folder,
        config=config,
        file=file,
        pairs={module: _pair(weights, config, module, found) for module, found in sides.items()},
        others=tuple(entry.name for entry in others),
        embeddings={
            module: _pair(weights, config, module, found, embedding=True)
            for module, found in embedding_sides.items()
        },
        **sorted_out,
    )


def _sort_others(config: AdapterConfig, others: list[TensorEntry]) -> dict[str, Any]:
    """Adapter's fields ``magnitudes``, ``tokens``, ``whole`` and ``unknown``."""
    magnitudes, tokens, whole, unknown = {}, {}, {}, []
    for entry in others:
        if match := _MAGNITUDE.fullmatch(entry.name):
            magnitudes[match["module"]] = entry
        elif match := _TOKENS.fullmatch(entry.name):
            tokens[match["module"]] = entry
        elif _EMBEDDING_FACTOR.fullmatch(entry.name) or _BASES_OWN.fullmatch(entry.name):
            continue
        elif (match := _WHOLE.fullmatch(entry.name)) and _is_saved_whole(config, **match.groupdict()):
            whole[f"{match['module']}.{match['parameter']}"] = entry
        else:
            unknown.append(entry.name)
    return {"magnitudes": magnitudes, "tokens": tokens, "whole": whole, "unknown": tuple(unknown)}


def _is_saved_whole(config: AdapterConfig, module: str, parameter: str) -> bool:
    """Whether PEFT saves this parameter of ``module`` itself under such a configuration."""
    if parameter == "bias" and config.bias != "none":
        return True
    names = [*(config.modules_to_save or ()), *_EMBEDDINGS]
    return any(is_in(module, name) for name in names)


def is_in(module: str, name: str) -> bool:
    """Whether ``module`` is one that ``modules_to_save`` means by ``name``, or a part of one; PEFT's rule."""
    parts = module.split(".")
    return any(".".join(parts[: end + 1]).endswith(name) for end in range(len(parts)))


def _is_or_ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _read_config(path: Path) -> AdapterConfig:
    if not path.is_file():
        raise ReleaseError(f"{path.parent} holds no {CONFIG_NAME}", "name the folder of a PEFT adapter")
    with path.open("rb") as file:
        data = file.read(_MAX_CONFIG_BYTES + 1)
    fix = "take the adapter from its source again"
    if len(data) > _MAX_CONFIG_BYTES:
        raise ReleaseError(f"{path} is over {_MAX_CONFIG_BYTES} bytes", fix)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as err:
        raise ReleaseError(f"{path} is not valid JSON: {err}", fix) from err
    if isinstance(content, dict) and content.get("peft_type") != "LORA":
        kind = content.get("peft_type")
        raise ReleaseError(
            f"{path}: peft_type is {kind!r}", "only LoRA adapters (peft_type LORA) can be read"
        )
    try:
        config = AdapterConfig.model_validate(
            _without_nulls(content) if isinstance(content, dict) else content
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            check_pattern(pattern)
    except ValidationError as err:
        key, words = first_problem(err)
        raise ReleaseError(f"{path}: {key}: {words}", fix) from err
    except ValueError as err:
        raise ReleaseError(f"{path}: {err}", fix) from err
    return config


def _without_nulls(content: dict[str, Any]) -> dict[str, Any]:
    """PEFT writes null for a pattern or a list that was not given."""
    return {key: value for key, value in content.items() if value is not None}


def check_pattern(pattern: str) -> None:
    """Refuse a regular expression that could take for ever: long, or with a repeated group.

    Raises ValueError saying so.
    """
    if len(pattern) > 256 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        raise ValueError(f"the module pattern {pattern[:40]!r} is too complex")
    try:
        re.compile(pattern)
    except re.error as err:
        raise ValueError(f"the module pattern {pattern!r} is no regular expression: {err}") from err


def value_for(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the module's name, or its end after a dot, as a whole."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _pair(
    path: Path,
    config: AdapterConfig,
    module: str,
    found: Mapping[str, TensorEntry],
    *,
    embedding: bool = False,
) -> LoraPair:
    damaged = "the adapter is damaged, or its adapter_config.json belongs to another one"
    if found.keys() != {"A", "B"}:
        raise ReleaseError(f"{path}: {module!r} has lora_{min(found)} without its partner", damaged)
    a, b, rank = found["A"], found["B"], config.rank_of(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ReleaseError(
            f"{path}: {module!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, not of rank {rank}",
            damaged,
        )
    for entry in (a, b):
        if entry.dtype not in FLOATS:
            raise ReleaseError(f"{path}: {entry.name!r} is {entry.dtype}, not a float tensor", damaged)
    return LoraPair(module, a, b, rank, config.scale_of(module), embedding or config.fan_in_fan_out)
