"""From a reference or a folder to a model that answers: pull, verify, load the base as trained, attach."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.errors import AdapterHubError, BaseMismatchError, ReleaseError
from adapterhub.packaging.base import check_base
from adapterhub.packaging.manifest import BaseLock
from adapterhub.packaging.release import Release

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Device = Literal["cpu", "cuda"]


def load_adapter(
    ref: str | Path,
    *,
    base: str | Path | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    keys: Path | str | Sequence[Path | str] = (),
    require_signed: bool = False,
    any_base: bool = False,
    device: Device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a released adapter, ready to generate: ``model, tokenizer = load_adapter("owner/name@v0.1.0")``.

    ``ref`` is a release's folder or ``owner/name[@version]`` on the Hub; every file is checked against the
    manifest, and a signature that is there must hold. ``require_signed`` refuses what none of your trusted
    keys (or ``keys``, public key files) signed. The base is loaded quantized as it was in training, on
    ``device`` (CUDA when there is one): ``base`` names its folder or Hub repository, by default the commit
    that the release names. Its digest must be the one trained on, unless ``any_base`` says that another will
    do. The tokenizer carries the chat template of training, and generation stops at that template's end
    token.

    A merged release is loaded by itself. Raises SignatureError, ReleaseError, BaseMismatchError, HubError.
    """
    paths = [Path(key) for key in ((keys,) if isinstance(keys, (str, Path)) else keys)]
    release = open_release(ref, endpoint=endpoint, token=token, keys=paths, require_signed=require_signed)
    if release.manifest.kind in ("merged", "quantized") and base is not None:
        raise ReleaseError(f"{ref} is a {release.manifest.kind} release: it needs no base", "leave base out")
    return load_release(release, base, endpoint=endpoint, token=token, any_base=any_base, device=device)


def open_release(
    ref: str | Path,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    keys: Sequence[Path] = (),
    require_signed: bool = False,
) -> Release:
    """The release that ``ref`` names, its files checked; what is no folder here is pulled from the Hub.

    Raises SignatureError when a file differs from the manifest, when a signature does not hold, or when
    ``require_signed`` finds none by a trusted key; HubError and its kinds as a pull does.
    """
    if not Path(ref).is_dir():
        from adapterhub.hub.pull import pull
        from adapterhub.hub.refs import looks_like_path

        if looks_like_path(str(ref)):
            raise ReleaseError(f"{ref}: no such folder", "check the path, or name owner/name[@version]")

        pulled = pull(str(ref), endpoint=endpoint, token=token, keys=keys, require_signed=require_signed)
        return pulled.release
    from adapterhub.packaging.signing import check_signature

    check_signature(Path(ref), keys, require_signed=require_signed)
    return Release.open(ref)


def load_release(
    release: Release,
    base: str | Path | None = None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    any_base: bool = False,
    device: Device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an opened release, whose files were checked by its opener; see ``load_adapter``.

    Returns (peft.PeftModel over the base, tokenizer) for an adapter, (model, tokenizer) for a merged
    checkpoint; in evaluation mode. Raises ReleaseError for a data set, for an adapter that its own
    configuration breaks, and for what `adapterhub scan` finds to be of severity high.
    """
    from adapterhub.packaging.scan.report import check_loadable
    from adapterhub.trainer.model import load_base, load_tokenizer
    from adapterhub.trainer.template import end_token_id

    manifest = release.manifest
    if manifest.kind == "dataset" or manifest.base is None:
        raise ReleaseError(
            f"{release.path} is a {manifest.kind} release, not a model", "name an adapter release"
        )
    device = _usable(device)
    check_loadable(release.path)  # before anything of it is opened
    tokenizer = load_tokenizer(release.path)
    if manifest.kind == "adapter":
        folder = find_base(manifest.base, base, endpoint=endpoint, token=token, any_base=any_base)
        model = _attach(load_base(folder, manifest.base.quantization, device), release.path)
    else:
        model = load_base(release.path, None, device)
    if tokenizer.chat_template:
        _stop_at(model, end_token_id(tokenizer))
    model.eval()
    return model, tokenizer


def find_base(
    lock: BaseLock | None,
    base: str | Path | None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    any_base: bool = False,
) -> Path:
    """The folder of the base that ``base`` names, or that ``lock`` does, checked against the lock's digest.

    Raises BaseMismatchError when it is another base than the lock's (unless ``any_base``), ReleaseError when
    nothing names one, HubError and its kinds when it cannot be fetched.
    """
    if base is not None and Path(base).is_dir():
        if lock is not None and not any_base:
            check_base(lock, Path(base))
        return Path(base)
    source = str(base) if base is not None else _source_of(lock)
    from adapterhub.hub.bases import fetch_base
    from adapterhub.hub.refs import looks_like_path

    if looks_like_path(source):
        raise ReleaseError(f"{source}: no such folder", "check the path of the base, or name owner/name")

    fetched = fetch_base(source, endpoint=endpoint, token=token)
    if lock is not None and not any_base:
        check_base(lock, fetched.folder, fetched.weights)
    return fetched.folder


def _source_of(lock: BaseLock | None) -> str:
    """Where the Hub keeps the base of ``lock``: always at a commit, for a branch could have moved on."""
    if lock is None:
        raise ReleaseError("nothing says which base this adapter belongs to", "name the base")
    if lock.revision is None:
        raise BaseMismatchError(
            f"the release was trained on a local copy of {lock.name}, and names no commit on the Hub",
            f"name that base's folder (base digest {lock.digest[:12]}…) as base=… or --base",
        )
    return f"{lock.name}@{lock.revision}"


def _attach(model: PreTrainedModel, folder: Path) -> Any:
    """Put the adapter in ``folder`` on ``model``, for inference."""
    from peft import PeftModel

    from adapterhub.packaging.adapter import read_adapter

    read_adapter(folder)  # refuses what its configuration does not describe, in our words
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by an old name
            return PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (ValueError, RuntimeError, KeyError) as err:
        first = " ".join(str(err).split())[:300] or type(err).__name__
        raise ReleaseError(
            f"the adapter in {folder} does not fit the base: {first}", "load it on the base it was trained on"
        ) from err


def _stop_at(model: Any, end_token: int) -> None:
    """Make generation stop at the end token of the trained chat template, beside what the base stops at."""
    settings = model.generation_config
    known = settings.eos_token_id
    known = known if isinstance(known, list) else [known]
    settings.eos_token_id = list(dict.fromkeys([end_token, *(token for token in known if token is not None)]))
    if settings.pad_token_id is None:
        settings.pad_token_id = end_token


def _usable(device: Device | None) -> Device:
    """``device`` if it is one that is here; CUDA or else the CPU for None. Raises AdapterHubError."""
    best = default_device()
    if device not in (None, "cpu", "cuda"):
        raise AdapterHubError(f"device {device!r} is not known", 'name "cpu" or "cuda", or leave device out')
    if device == "cuda" and best != "cuda":
        raise AdapterHubError("there is no CUDA device that torch can use here", "leave device out")
    return device or best


def default_device() -> Device:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
