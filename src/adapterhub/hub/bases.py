"""Base models from a Hub: what loading needs of them, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from adapterhub.errors import RefError, ReleaseError
from adapterhub.hub.client import connect, hub_errors, resolve
from adapterhub.hub.refs import parse_ref
from adapterhub.hub.snapshots import HubFile, fetch, list_files
from adapterhub.packaging.files import MANIFEST_NAME

_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_COMPANIONS = (
    _CONFIG, "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "LICENSE*", "LICENCE*", "NOTICE*",  # what a merged release must carry on
    "README.md",  # names the licence
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class FetchedBase:
    """A base model in the Hugging Face cache."""

    folder: Path
    """Holds its configuration, tokenizer and weights."""
    name: str
    """``owner/name``."""
    revision: str
    """The commit, 40 hex digits."""
    weights: Mapping[str, str]
    """sha256 of each safetensors file by its name, 64 hex digits."""


def fetch_config(source: str, *, endpoint: str | None = None, token: str | None = None) -> Path:
    """The path of a base's config.json in the cache; nothing else is downloaded.

    ``source`` is ``owner/name[@revision]``. Raises RefError when there is no such base or it has no
    config.json, AuthError, HubError.
    """
    ref, api = parse_ref(source), connect(endpoint, token)
    commit = resolve(api, ref).commit
    with hub_errors(api, ref):
        return Path(api.hf_hub_download(ref.repo, _CONFIG, revision=commit))


def fetch_tokenizer(source: str, *, endpoint: str | None = None, token: str | None = None) -> Path:
    """The folder in the cache that holds a base's configuration, tokenizer and chat template; no weights.

    ``source`` is ``owner/name[@revision]``; files are checked as ``fetch_base`` checks them. Raises RefError
    for an unknown base, AuthError, HubError.
    """
    ref, api = parse_ref(source), connect(endpoint, token)
    commit = resolve(api, ref).commit
    return fetch(api, ref, commit, "tokenizer", _companions).folder


def _companions(listed: Mapping[str, HubFile]) -> list[str]:
    """The files that a base's weights come with."""
    return [name for name in listed if _matches(name, _COMPANIONS)]


def is_release(source: str, *, endpoint: str | None = None, token: str | None = None) -> bool:
    """Whether ``owner/name[@revision]`` holds a manifest, sound or not. Raises HubError and its kinds."""
    ref, api = parse_ref(source), connect(endpoint, token)
    return MANIFEST_NAME in list_files(api, ref, resolve(api, ref).commit)


def fetch_base(source: str, *, endpoint: str | None = None, token: str | None = None) -> FetchedBase:
    """Bring a base model into the cache: configuration, tokenizer, chat template and top-level safetensors.

    ``source`` is ``owner/name[@revision]``. Every file is compared with the Hub's digest when it is first
    seen, by sha256 or, for small files, by git's sha1. Later calls compare sizes and times of change, and
    hash again what was touched: a cache damaged without that (bad memory, a failing disk) is not noticed
    here. With a commit, or with HF_HUB_OFFLINE set, they ask the Hub nothing.

    Raises RefError for an unknown base, ReleaseError for one without safetensors, AuthError, HubError, and
    OSError when the disk is full.
    """
    ref, api = parse_ref(source), connect(endpoint, token)
    commit = resolve(api, ref).commit
    snapshot = fetch(api, ref, commit, "base", lambda listed: _choose(listed, str(ref)))
    weights = {name: digest for name, digest in snapshot.digests.items() if fnmatchcase(name, _WEIGHTS[0])}
    return FetchedBase(snapshot.folder, ref.repo, commit, weights)


def _choose(listed: Mapping[str, HubFile], base: str) -> list[str]:
    """The files of a base that loading needs."""
    if not any(_matches(name, _WEIGHTS[:1]) for name in listed):
        raise _no_safetensors(listed, base)
    if _CONFIG not in listed:
        raise RefError(f"{base} holds no {_CONFIG}", "name a repository that transformers can load")
    return [name for name in listed if _matches(name, _COMPANIONS + _WEIGHTS)]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether ``name`` matches a pattern in the pattern's own folder."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def _no_safetensors(listed: Mapping[str, HubFile], base: str) -> ReleaseError:
    pickles = sorted(name for name in listed if PurePosixPath(name).suffix in _PICKLES)
    if pickles:
        return ReleaseError(
            f"{base} holds weights only as pickles ({pickles[0]}), which can run code when opened",
            "look for a revision with safetensors (often refs/pr/1), or write them with save_pretrained()",
        )
    return ReleaseError(
        f"{base} holds no *.safetensors weights", "name the repository of a transformers model"
    )
