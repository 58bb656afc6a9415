"""From a reference or a folder to a model that answers: pull, verify, load the base as trained, attach."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub.errors import (
    AdapterHubError,
    AdapterHubWarning,
    BaseMismatchError,
    LockError,
    ReleaseError,
)
from adapterhub.packaging.base import check_base, check_reason
from adapterhub.packaging.manifest import BaseLock, BaseMismatch, Quantization
from adapterhub.packaging.release import Release

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adapterhub.packaging.adapter import Adapter

Device = Literal["cpu", "cuda"]
Note = Callable[[BaseMismatch], None]


def load_adapter(
    ref: str | Path,
    *,
    base: str | Path | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    keys: Path | str | Sequence[Path | str] = (),
    require_signed: bool = False,
    locked: bool | str | Path = False,
    allow_base_mismatch: str | None = None,
    device: Device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a released adapter, ready to generate: ``model, tokenizer = load_adapter("owner/name@v0.1.0")``.

    ``ref`` is a release's folder or ``owner/name[@version]`` on the Hub; every file is checked against the
    manifest, and a signature that is there must hold. ``require_signed`` refuses what none of your trusted
    keys (or ``keys``, public key files) signed. The base is loaded quantized as it was in training, on
    ``device`` (CUDA when there is one): ``base`` names its folder or Hub repository, by default the commit
    that the release names. Weights, configuration, tokenizer and chat template must be those trained on,
    unless ``allow_base_mismatch`` says in words why another base will do; an AdapterHubWarning then tells
    what differs. The tokenizer carries the chat template of training, and generation stops at that template's
    end token.

    ``locked`` takes exactly what a lock file holds for ``ref``: the one it names, or with True the
    adapterhub.lock beside the running program, else in the current folder.

    A merged release is loaded by itself. Raises SignatureError, LockError, ReleaseError, BaseMismatchError,
    HubError.
    """
    paths = [Path(key) for key in ((keys,) if isinstance(keys, (str, Path)) else keys)]
    check_reason(allow_base_mismatch)
    release = open_release(
        ref, endpoint=endpoint, token=token, keys=paths, require_signed=require_signed, locked=locked
    )
    if release.manifest.kind in ("merged", "quantized") and base is not None:
        raise ReleaseError(f"{ref} is a {release.manifest.kind} release: it needs no base", "leave base out")
    return load_release(
        release,
        base,
        endpoint=endpoint,
        token=token,
        allow_base_mismatch=allow_base_mismatch,
        device=device,
    )


def open_release(
    ref: str | Path,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    keys: Sequence[Path] = (),
    require_signed: bool = False,
    locked: bool | str | Path = False,
) -> Release:
    """The release that ``ref`` names, its files checked; what is no folder here is pulled from the Hub.

    ``locked``: see ``load_adapter``. Raises SignatureError when a file differs from the manifest, when a
    signature does not hold, or when ``require_signed`` finds none by a trusted key; LockError when ``ref`` is
    not locked, or a folder, which cannot be; HubError and its kinds as a pull does.
    """
    if locked is not False:
        from adapterhub.hub.lock import pull_locked
        from adapterhub.hub.lockfile import find_lock

        if Path(ref).is_dir():
            raise LockError(f"{ref} is a folder, and a lock holds releases of a Hub", "leave locked out")
        path = find_lock(locked)
        return pull_locked(
            str(ref), path, endpoint=endpoint, token=token, keys=keys, require_signed=require_signed
        ).release
    if not Path(ref).is_dir():
        from adapterhub.hub.pull import pull
        from adapterhub.hub.refs import looks_like_path

        if looks_like_path(str(ref)):
            raise ReleaseError(f"{ref}: no such folder", "check the path, or name owner/name[@version]")

        pulled = pull(str(ref), endpoint=endpoint, token=token, keys=keys, require_signed=require_signed)
        return pulled.release
    from adapterhub.packaging.verification import check_release

    return check_release(Path(ref), keys, require_signed=require_signed).release


def load_release(
    release: Release,
    base: str | Path | None = None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    allow_base_mismatch: str | None = None,
    note: Note = lambda mismatch: None,
    device: Device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an opened release, whose files were checked by its opener; see ``load_adapter``.

    ``note`` is told of another base that was allowed, for what is measured on it to record it.
    What is loaded is what the release's manifest and the base's lock name, though the folders change
    meanwhile: see ``packaging.views``. Returns (peft.PeftModel over the base, tokenizer) for an adapter,
    (model, tokenizer) for a merged checkpoint; in evaluation mode. Raises ReleaseError for a data set, for an
    adapter that its own configuration breaks, and for what `adapterhub scan` finds to be of severity high;
    SignatureError for a file that is not, or does not stay, what the manifest lists.
    """
    from adapterhub.packaging.views import view_release
    from adapterhub.trainer.model import load_base, load_tokenizer
    from adapterhub.trainer.template import end_token_id

    manifest = release.manifest
    if manifest.kind == "dataset" or manifest.base is None:
        raise ReleaseError(
            f"{release.path} is a {manifest.kind} release, not a model", "name an adapter release"
        )
    device = _usable(device)
    with view_release(release) as view:
        tokenizer = load_tokenizer(view)
        if manifest.kind == "adapter":
            source = _locate(manifest.base, base, endpoint, token)
            model = _load_checked(source, manifest.base, device, allow_base_mismatch, note)
            model = _attach(model, view)
        else:
            model = load_base(view, None, device)
            model.config.name_or_path = str(release.path)
    tokenizer.name_or_path = str(release.path)  # the view is gone
    if tokenizer.chat_template:
        _stop_at(model, end_token_id(tokenizer))
    model.eval()
    return model, tokenizer


def load_plain(
    adapter: Path, base: Path, quantization: Quantization | None, device: Device | None = None
) -> PreTrainedModel:
    """A plain PEFT adapter on its base as it was trained: in ``quantization``, or for None in 16 bits.

    In evaluation mode. Raises ReleaseError when one does not fit the other.
    """
    from adapterhub.trainer.model import load_base

    model: PreTrainedModel = _attach(load_base(base, quantization, _usable(device)), adapter)
    return model.eval()


def find_base(
    lock: BaseLock | None,
    base: str | Path | None,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    allow_mismatch: str | None = None,
    note: Note = lambda mismatch: None,
) -> Path:
    """The folder of the base that ``base`` names, or that ``lock`` does, held against the lock's digests.

    Raises BaseMismatchError when it is another base than the lock's; with ``allow_mismatch``, the reason why
    it will do, ``note`` and an AdapterHubWarning tell what differs instead. Raises ReleaseError when nothing
    names a base, HubError and its kinds when it cannot be fetched.
    """
    source = _locate(lock, base, endpoint, token)
    if lock is not None:
        weights = source.weights() if source.weights is not None else None
        _tell(check_base(lock, source.folder, weights, allow_mismatch=allow_mismatch), note)
    return source.folder


@dataclass(frozen=True)
class _Source:
    """Where a base lies."""

    folder: Path
    weights: Callable[[], Mapping[str, str]] | None
    """Gives the sha256 of its weight files as the Hub vouches for them, checked again; None without a Hub."""


def _load_checked(
    source: _Source, lock: BaseLock, device: Device, allow_mismatch: str | None, note: Note
) -> PreTrainedModel:
    """The base in ``source``, found to be the one of ``lock`` and to have stayed so while it was loaded."""
    from adapterhub.packaging.views import view_base
    from adapterhub.trainer.model import load_base

    with view_base(source.folder, source.weights) as (view, weights):
        _tell(check_base(lock, view, weights, allow_mismatch=allow_mismatch), note)
        model = load_base(view, lock.quantization, device)
    model.config.name_or_path = str(source.folder)  # the view is gone
    return model


def _tell(mismatch: BaseMismatch | None, note: Note) -> None:
    """Say that another base was allowed, and why."""
    if mismatch is not None:
        words = f"loaded on another base than trained on ({'; '.join(mismatch.differs)})"
        warnings.warn(AdapterHubWarning(f"{words}, because: {mismatch.reason}"), stacklevel=4)
        note(mismatch)


def _locate(
    lock: BaseLock | None, base: str | Path | None, endpoint: str | None, token: str | None
) -> _Source:
    """Find the base's folder; what is none here is fetched from the Hub."""
    if base is not None and Path(base).is_dir():
        return _Source(Path(base), None)
    source = str(base) if base is not None else _source_of(lock)
    from adapterhub.hub.bases import fetch_base
    from adapterhub.hub.refs import looks_like_path

    if looks_like_path(source):
        raise ReleaseError(f"{source}: no such folder", "check the path of the base, or name owner/name")

    fetched = fetch_base(source, endpoint=endpoint, token=token)
    at_commit = f"{fetched.name}@{fetched.revision}"  # asks the Hub nothing once it is here
    return _Source(fetched.folder, lambda: fetch_base(at_commit, endpoint=endpoint, token=token).weights)


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
    from adapterhub.trainer.vocabulary import grow_for_adapter, resize_for_adapter

    adapter = read_adapter(folder)  # refuses what its configuration does not describe, in our words
    _check_fit(model, adapter)
    if adapter.config.trainable_token_indices:
        grow_for_adapter(model, adapter.config.trainable_token_indices)
    resize_for_adapter(model, adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by an old name
            return PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (ValueError, RuntimeError, KeyError) as err:
        first = " ".join(str(err).split())[:300] or type(err).__name__
        raise ReleaseError(
            f"the adapter in {folder} does not fit the base: {first}", "load it on the base it was trained on"
        ) from err


def _check_fit(model: PreTrainedModel, adapter: Adapter) -> None:
    """Raise ReleaseError for factors that belong to no layer of the base, or to one of another size.

    PEFT passes over the former in silence: the model would answer as if that part had not been trained.
    """
    from adapterhub.packaging.scan.findings import quote

    there = dict(model.named_modules())
    astray = [module for module in (*adapter.pairs, *adapter.embeddings) if module not in there]
    told = [f"the base has no {quote(module, 80)}" for module in astray]
    for module, pair in adapter.pairs.items():
        layer = there.get(module)
        sides = (
            getattr(layer, "out_features", pair.out_features),
            getattr(layer, "in_features", pair.in_features),
        )
        if sides != (pair.out_features, pair.in_features):
            ours = f"{pair.out_features} × {pair.in_features}"
            told.append(f"{quote(module, 80)} is {sides[0]} × {sides[1]} in the base and {ours} here")
    if told:
        more = f"; and {len(told) - 2} more" if len(told) > 2 else ""
        raise ReleaseError(
            f"the adapter in {adapter.folder} does not fit the base: {'; '.join(told[:2])}{more}",
            "load it on the base it was trained on",
        )


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
