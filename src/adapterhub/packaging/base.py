"""The base model's identity: digests of its weights, configuration, tokenizer and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from adapterhub.errors import AdapterHubError, BaseMismatchError, ReleaseError
from adapterhub.packaging.digests import hash_files
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.manifest import BaseLock, BaseMismatch, Quantization

WEIGHT_SUFFIX = ".safetensors"
CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
_SHOWN = 4
"""Differing weight files that are named."""
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
    ``chat_template`` is the template's text as the base's tokenizer has it; without it, it is read. Raises
    ReleaseError when config.json or the weights are missing.
    """
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise ReleaseError(f"{folder} holds no {CONFIG_NAME}", "name the folder of a transformers checkpoint")
    if weights is None:
        weights = hash_weights(folder)
    if chat_template is None:
        chat_template = read_template(folder)
    tokenizer = folder / TOKENIZER_NAME
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


def check_base(
    expected: BaseLock,
    folder: Path,
    weights: Mapping[str, str] | None = None,
    *,
    allow_mismatch: str | None = None,
) -> BaseMismatch | None:
    """Raise BaseMismatchError, naming all that differs, unless ``folder`` holds the base of ``expected``.

    ``weights`` are the sha256 of its weight files where known already; without them each file is hashed.
    ``allow_mismatch`` is why another base will do, in words: what differs is returned with that reason then,
    to be recorded. Returns None when nothing differs. Raises AdapterHubError for a reason without words.
    """
    check_reason(allow_mismatch)
    found = weights if weights is not None else hash_weights(folder)
    differs = find_differences(expected, folder, found)
    if not differs:
        return None
    if allow_mismatch is not None:
        return BaseMismatch(
            reason=" ".join(allow_mismatch.split()),
            differs=differs,
            digest=base_digest(found),
            folder=folder.name,
        )
    raise BaseMismatchError(
        f"the base in {folder} is not {expected.name} as trained on: {'; '.join(differs)}",
        f"load it on {expected.name}"
        + (f" at commit {expected.revision}" if expected.revision else "")
        + ", or say why another base will do: --allow-base-mismatch REASON",
    )


def check_reason(reason: str | None) -> None:
    """Raise AdapterHubError for a reason to allow another base that says nothing."""
    if reason is not None and not reason.strip():
        raise AdapterHubError(
            "the reason to allow another base is empty", "say in words why another one will do"
        )


def find_differences(expected: BaseLock, folder: Path, weights: Mapping[str, str]) -> tuple[str, ...]:
    """What of the base in ``folder`` is not as ``expected`` has it, in words; ``weights`` are its digests.

    A tokenizer or chat template that the folder lacks is no difference, for a release brings its own; nor is
    one that was not locked.
    """
    differs = [
        f"{name} {_other(expected.weights.get(name), weights.get(name))}"
        for name in sorted(expected.weights.keys() | weights.keys())
        if expected.weights.get(name) != weights.get(name)
    ]
    if len(differs) > _SHOWN:
        differs[_SHOWN:] = [f"{len(differs) - _SHOWN} more weight files"]
    if not differs and base_digest(weights) != expected.digest:
        differs.append("base digest " + _other(expected.digest, base_digest(weights)))
    config, tokenizer, template = folder / CONFIG_NAME, folder / TOKENIZER_NAME, read_template(folder)
    found = sha256_file(config) if config.is_file() else None
    if found != expected.config_sha256:
        differs.append(f"{CONFIG_NAME} {_other(expected.config_sha256, found)}")
    if expected.tokenizer_sha256 is not None and tokenizer.is_file():
        found = sha256_file(tokenizer)
        if found != expected.tokenizer_sha256:
            differs.append(f"{TOKENIZER_NAME} {_other(expected.tokenizer_sha256, found)}")
    if expected.chat_template_sha256 is not None and template is not None:
        found = sha256(template.encode()).hexdigest()
        if found != expected.chat_template_sha256:
            differs.append(f"chat template {_other(expected.chat_template_sha256, found)}")
    return tuple(differs)


def read_template(folder: Path) -> str | None:
    """The chat template that transformers would find in ``folder``; None without one, or without a default.

    A file ``chat_template.jinja`` goes before what tokenizer_config.json holds. Raises ReleaseError when
    that file cannot be read as text or JSON.
    """
    try:
        file = folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        held = json.loads(settings.read_bytes()).get("chat_template") if settings.is_file() else None
        if isinstance(held, list):
            held = {entry["name"]: entry["template"] for entry in held}.get("default")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as err:
        raise ReleaseError(
            f"the chat template in {folder} cannot be read: {err}", "take the base from its source again"
        ) from err
    return held if isinstance(held, str) else None


def hash_weights(folder: Path) -> dict[str, str]:
    """The sha256 of each weight file by its name; see ``digests.hash_files``. Raises ReleaseError."""
    return {path.name: digest for path, digest in hash_files(weight_files(folder)).items()}


def check_config(expected: BaseLock, folder: Path) -> None:
    """Raise BaseMismatchError unless config.json in ``folder`` is the one that ``expected`` names."""
    config = folder / CONFIG_NAME
    if not config.is_file() or sha256_file(config) != expected.config_sha256:
        raise BaseMismatchError(
            f"the base in {folder} is not {expected.name} as trained on: {CONFIG_NAME} differs",
            f"take {CONFIG_NAME} from {expected.name}"
            + (f" at commit {expected.revision}" if expected.revision else ""),
        )


def _other(expected: str | None, found: str | None) -> str:
    """``differs (sha256 12ab…, expected 34cd…)``, or that it is missing or new."""
    if found is None:
        return "is missing"
    if expected is None:
        return f"is new (sha256 {found[:12]}…)"
    return f"differs (sha256 {found[:12]}…, expected {expected[:12]}…)"


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
