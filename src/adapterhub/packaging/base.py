"""The base model's identity: digests of its weights, configuration, tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from adapterhub.errors import BaseMismatchError, ReleaseError
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.manifest import BaseLock, Quantization

WEIGHT_SUFFIX = ".safetensors"
_MOST_OF_A_CARD = 256 * 1024  # bytes; front matter stands at the top


def base_digest(weights: Mapping[str, str]) -> str:
    """One digest for all weight files: sha256 over the sorted lines ``<sha256>  <file name>\\n``.

    ``weights`` maps each weight file's relative path to its sha256 (64 hex digits). The Hub lists these
    without a download. It is what ``sha256sum *.safetensors | LC_ALL=C sort -k2 | sha256sum`` prints.
    """
    lines = sorted((name, digest) for name, digest in weights.items())
    return sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The base's safetensors files, sorted by name.

    Raises ReleaseError when there are none; pickle weights (``*.bin``, ``*.pt``) are named and refused.
    """
    if not folder.is_dir():
        raise ReleaseError(f"{folder}: no such folder", "check the path of the base model")
    found = sorted(folder.glob(f"*{WEIGHT_SUFFIX}"))
    if found:
        return found
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise ReleaseError(
            f"{folder} holds weights only as pickles ({pickles[0]}), which can run code when opened",
            "save the base with save_pretrained(), which writes safetensors",
        )
    raise ReleaseError(
        f"{folder} holds no *{WEIGHT_SUFFIX} weights", "name the folder of a transformers checkpoint"
    )


def lock_base(
    folder: Path,
    *,
    name: str,
    revision: str | None = None,
    quantization: Quantization | None = None,
    weights: Mapping[str, str] | None = None,
    chat_template: str | None = None,
) -> BaseLock:
    """The lock of the base in ``folder``.

    ``weights`` are digests known already (the Hub's listing); without them each file is read and hashed.
    ``chat_template`` is the template's text as the base's tokenizer has it. Raises ReleaseError when
    config.json or the weights are missing.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ReleaseError(f"{folder} holds no config.json", "name the folder of a transformers checkpoint")
    if weights is None:
        weights = {path.name: sha256_file(path) for path in weight_files(folder)}
    tokenizer = folder / "tokenizer.json"
    return BaseLock(
        name=name,
        revision=revision,
        digest=base_digest(weights),
        weights=dict(weights),
        config_sha256=sha256_file(config),
        tokenizer_sha256=sha256_file(tokenizer) if tokenizer.is_file() else None,
        chat_template_sha256=sha256(chat_template.encode()).hexdigest()
        if chat_template is not None
        else None,
        quantization=quantization,
        licence=_licence_in(folder / "README.md"),
    )


def check_base(expected: BaseLock, folder: Path, weights: Mapping[str, str] | None = None) -> None:
    """Raise BaseMismatchError unless ``folder`` holds the weights and the configuration of ``expected``.

    ``weights`` are the sha256 of its weight files where known already; without them each file is hashed.
    """
    found = (
        weights if weights is not None else {path.name: sha256_file(path) for path in weight_files(folder)}
    )
    differing = sorted(
        name
        for name in expected.weights.keys() | found.keys()
        if expected.weights.get(name) != found.get(name)
    )
    if base_digest(found) != expected.digest:
        raise BaseMismatchError(
            f"the base in {folder} is not {expected.name} as trained on: {', '.join(differing[:3])} "
            f"(base digest {base_digest(found)[:12]}…, expected {expected.digest[:12]}…)",
            f"load it on {expected.name}" + (f" at commit {expected.revision}" if expected.revision else ""),
        )
    check_config(expected, folder)


def check_config(expected: BaseLock, folder: Path) -> None:
    """Raise BaseMismatchError unless config.json in ``folder`` is the one that ``expected`` names."""
    config = folder / "config.json"
    if not config.is_file() or sha256_file(config) != expected.config_sha256:
        raise BaseMismatchError(
            f"the base in {folder} is not {expected.name} as trained on: config.json differs",
            f"take config.json from {expected.name}"
            + (f" at commit {expected.revision}" if expected.revision else ""),
        )


def _licence_in(card: Path) -> str | None:
    """The licence that a model card's front matter names; None where there is none to be read."""
    import yaml

    if not card.is_file():
        return None
    with card.open("rb") as file:
        text = file.read(_MOST_OF_A_CARD).decode(errors="replace")
    parts = re.split(r"^---[ \t]*\r?$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip("\ufeff \r\n"):
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    named = [front.get(key) for key in ("license_name", "license")] if isinstance(front, dict) else []
    return next((name for name in named if isinstance(name, str) and 0 < len(name) <= 200), None)
