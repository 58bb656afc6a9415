"""The JSON beside the weights: what in it names code, leads out of the folder, or changes what loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from adapterhub.packaging.adapter import CONFIG_NAME
from adapterhub.packaging.scan.findings import Finding, Severity, quote

_MAX_DEPTH = 20
_MAX_RANK = 1024
_MAX_SCALE = 64.0
_MAX_PATTERN_CHARS = 4096
# peft.LoraConfig as of 0.21; what is not here is newer than this scan, or no setting of peft's.
_KNOWN = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
}  # fmt: skip
# Settings with which peft imports a module whose name stands in the file.
_IMPORTS = {"auto_mapping": (None,), "megatron_config": (None,), "megatron_core": (None, "megatron.core")}
# Files beside the tokenizer's settings that transformers opens at the path they give.
_TOKENIZER_PATHS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "source_spm", "target_spm")
_ASK = "ask its maker why; do not load it"


def scan_settings(folder: Path, names: list[str]) -> Iterator[Finding]:
    """What the JSON files among ``names`` (plain files in ``folder``) say beyond plain settings.

    Only those in the folder itself are read as settings by loaders. The adapter's own configuration is held
    to an allow-list of peft's keys.
    """
    for name in names:
        if PurePosixPath(name).suffix != ".json" or "/" in name or name.endswith("tokenizer.json"):
            continue
        content, problem = read_json(folder / name)
        if problem is not None:
            yield Finding("high", "json", problem, name, "take the folder from its source again")
        yield from _remote_code(content, name)
        if name == CONFIG_NAME and isinstance(content, dict):
            yield from _adapter(content)
        if name == "tokenizer_config.json" and isinstance(content, dict):
            yield from _tokenizer(content, name)


def read_json(path: Path) -> tuple[Any, str | None]:
    """A JSON file's content, and what is wrong with it in words if something is."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _value in pairs]
            twice.extend(key for key in result if keys.count(key) > 1)
        return result

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as err:
        return None, f"not valid JSON: {quote(err, 120)}"
    if twice:
        return content, f"{quote(twice[0])!r} stands twice: which one counts depends on the reader"
    return content, None


def _remote_code(content: object, name: str, at: str = "", depth: int = 0) -> Iterator[Finding]:
    """Keys that name code to fetch and run, at any depth."""
    if not isinstance(content, (dict, list)):
        return
    if depth > _MAX_DEPTH:
        what = f"nested more than {_MAX_DEPTH} deep: what is in there was not looked at"
        yield Finding("high", "json", what, name, _ASK)
        return
    items: list[tuple[Any, Any]] = list(content.items() if isinstance(content, dict) else enumerate(content))
    for key, value in items:
        where = f"{at}.{key}" if at else str(key)
        if key in ("auto_map", "custom_pipelines") and value:
            what = f"{key} names code to import: {quote(json.dumps(value), 100)}"
            yield Finding("high", "auto-map", what, f"{name}: {quote(where)}", _ASK)
        elif key == "trust_remote_code" and value:
            yield Finding("high", "remote-code", "asks to run code", f"{name}: {quote(where)}", _ASK)
        else:
            yield from _remote_code(value, name, where, depth + 1)


def _adapter(config: Mapping[str, Any]) -> Iterator[Finding]:
    for key, allowed in _IMPORTS.items():
        if config.get(key) not in allowed and config.get(key):
            what = f"makes peft import what the file names: {quote(json.dumps(config[key]), 100)}"
            yield Finding("high", "import", what, f"{CONFIG_NAME}: {key}", _ASK)
    for key in sorted(config.keys() - _KNOWN):
        # What is off changes nothing; what is on could change what loads in a way that nothing here checks.
        severity: Severity = "high" if config[key] else "low"
        what = f"no setting of a LoRA in peft as known here: {quote(json.dumps(config[key]), 80)}"
        fix = "take it out if it does not matter, or ask for a newer adapterhub that knows it"
        yield Finding(severity, "unknown-key", what, f"{CONFIG_NAME}: {quote(key)}", fix)
    yield from _base_name(config.get("base_model_name_or_path"))
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        yield from _pattern(config.get(key), key)
    yield from _numbers(config)
    if config.get("modules_to_save"):
        what = f"replaces whole weights of the base: {quote(config['modules_to_save'], 120)}"
        yield Finding("low", "replaces-weights", what, f"{CONFIG_NAME}: modules_to_save", "know that it does")
    if config.get("layer_replication"):
        what = f"rebuilds the base from copies of its layers: {quote(config['layer_replication'], 120)}"
        yield Finding("medium", "replicates", what, f"{CONFIG_NAME}: layer_replication", "know that it does")


def _base_name(name: object) -> Iterator[Finding]:
    where = f"{CONFIG_NAME}: base_model_name_or_path"
    if not isinstance(name, str) or not name:
        return
    path = PurePosixPath(name.replace("\\", "/"))
    if ".." in path.parts or "://" in name or name.startswith("~"):
        what = f"names its base by a way out of this folder: {quote(name, 120)}"
        yield Finding("medium", "base-path", what, where, "name the base yourself when you load it")
    elif path.is_absolute() or name[1:2] == ":" or len(path.parts) != 2:
        what = f"names a folder of its maker's machine as the base, nothing on a Hub: {quote(name, 120)}"
        yield Finding("low", "base-path", what, where, "name the base yourself when you load it")


def _pattern(pattern: object, key: str) -> Iterator[Finding]:
    """A regular expression that peft matches against every module's name."""
    if not isinstance(pattern, str):
        return
    nested = any(f"{end}{repeat}" in pattern for end in ("*)", "+)", "})") for repeat in ("*", "+", "{"))
    if nested or len(pattern) > _MAX_PATTERN_CHARS:
        what = f"a pattern that could take for ever to match: {quote(pattern, 100)}"
        fix = "list the modules by name instead"
        yield Finding("high", "slow-pattern", what, f"{CONFIG_NAME}: {key}", fix)


def _numbers(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Rank and scale beyond what adapters have; what is no number at all, the adapter's reader refuses."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        return
    if rank > _MAX_RANK:
        what = f"rank {rank}, over {_MAX_RANK}: memory for it is taken before anything is loaded"
        yield Finding("medium", "rank", what, f"{CONFIG_NAME}: r", "ask its maker whether that is meant")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if not -_MAX_SCALE <= scale <= _MAX_SCALE or scale < 0:
        what = f"scales the adapter by {scale:g}; usual is 0.5 to 4, at most {_MAX_SCALE:g} is expected"
        yield Finding(
            "medium", "scale", what, f"{CONFIG_NAME}: lora_alpha", "ask its maker whether it is meant"
        )


def _tokenizer(config: Mapping[str, Any], name: str) -> Iterator[Finding]:
    for key in _TOKENIZER_PATHS:
        value = config.get(key)
        if isinstance(value, str) and (value.startswith(("/", "~", "\\")) or ".." in value or ":" in value):
            what = f"makes transformers open a path outside the folder: {quote(value, 120)}"
            yield Finding("high", "path", what, f"{name}: {key}", _ASK)
