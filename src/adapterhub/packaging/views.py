"""What is checked is what is loaded: a private folder for loaders to read, with checked files and no others.

Small files are copied there and hashed on the way, so that the copy is what was checked, whatever becomes of
the original. Weights too large to copy are links: their inode, size and times of change are taken before they
are hashed and compared after they were loaded, and no program can set the last of those times back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from adapterhub.errors import AdapterHubError, ReleaseError, SignatureError
from adapterhub.packaging.base import WEIGHT_SUFFIX, weight_files
from adapterhub.packaging.checkpoint import INDEX_NAME, read_index
from adapterhub.packaging.digests import hash_files
from adapterhub.packaging.manifest import MANIFEST_NAME, FileEntry
from adapterhub.packaging.release import Release
from adapterhub.packaging.scan.report import check_loadable
from adapterhub.packaging.tensors import read_header

# What transformers reads of a base beside its weights, and what a base lock has digests of.
_OF_A_BASE = (
    "config.json", "generation_config.json", INDEX_NAME,
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
_CHUNK = 1024 * 1024
_RETRY = "leave the folder alone while it is loaded, and do it again"


@contextmanager
def view_release(release: Release) -> Iterator[Path]:
    """A private folder to load ``release`` from, scanned, its files those that the manifest lists.

    An adapter is copied whole; of a merged checkpoint the weights are links, held still until the block ends.
    Raises SignatureError for a file that is not what the manifest lists, or that changes before the end;
    ReleaseError for what `adapterhub scan` finds to be of severity high.
    """
    files = release.manifest.files
    whole = release.manifest.kind in ("merged", "quantized")
    linked = [name for name in files if whole and name.endswith(WEIGHT_SUFFIX)]
    if whole and "adapter_config.json" in files:
        raise ReleaseError(
            f"{release.path} is a {release.manifest.kind} release with an adapter_config.json, which makes "
            "transformers load another model",
            "ask its maker for one without",
        )
    with _private_folder(release.path) as view:
        for name in files.keys() - set(linked):
            _copy(release.path / name, view / name, files[name])
        (view / MANIFEST_NAME).write_bytes(release.manifest.to_bytes())
        check_loadable(view)
        with _held_still(release.path, view, linked) as hash_now:
            for name, digest in hash_now().items():
                if digest != files[name].sha256:
                    raise _not_as_listed(release.path / name, files[name])
                read_header(view / name)
            yield view


@contextmanager
def view_base(
    folder: Path, vouched: Callable[[], Mapping[str, str]] | None = None
) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """A private folder to load the base in ``folder`` from, and the sha256 of its weight files by name.

    It holds what transformers reads of a base and no more; the weights are links, held still until the block
    ends. ``vouched`` gives their digests where a Hub does; without it they are hashed. Raises ReleaseError
    for a base without safetensors or with an index that leads elsewhere, SignatureError when a weight file
    changes before the end.
    """
    names = [path.name for path in weight_files(folder)]
    with _private_folder(folder) as view:
        for name in _OF_A_BASE:
            if (folder / name).is_file():
                _copy(folder / name, view / name)
        if (view / INDEX_NAME).is_file():
            read_index(view)  # transformers would open whatever paths it names
        with _held_still(folder, view, names) as hash_now:
            digests = vouched() if vouched is not None else hash_now()
            yield view, digests


@contextmanager
def _private_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that only this user can open, removed at the end.

    Errors from inside the block speak of ``folder`` instead.
    """
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as private:
        view = Path(private) / (folder.resolve().name or "model")
        view.mkdir()
        try:
            yield view
        except AdapterHubError as err:
            what, fix = (text.replace(str(view), str(folder)) for text in (err.what, err.fix))
            raise type(err)(what, fix) from err


@contextmanager
def _held_still(folder: Path, view: Path, names: Iterable[str]) -> Iterator[Callable[[], dict[str, str]]]:
    """Link ``names`` into ``view``; raise SignatureError at the end of the block if one has changed since.

    Yields what hashes them, by name.
    """
    files = {name: folder / name for name in names}
    before = {name: _state(path) for name, path in files.items()}
    for name, path in files.items():
        (view / name).parent.mkdir(parents=True, exist_ok=True)
        (view / name).symlink_to(path.resolve())

    def hash_now() -> dict[str, str]:
        digests = hash_files(view / name for name in files)
        return {name: digests[view / name] for name in files}

    yield hash_now
    for name, path in files.items():
        if _state(view / name) != before[name]:
            raise SignatureError(f"{path} changed while it was loaded", _RETRY)


def _state(path: Path) -> tuple[int, ...]:
    """What tells one state of a file from every other one."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _copy(source: Path, target: Path, listed: FileEntry | None = None) -> None:
    """Copy a file that is opened once; raise SignatureError when its bytes are not what is ``listed``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = sha256(), 0
    try:
        with source.open("rb") as file, target.open("xb") as copy:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                if listed is not None and size > listed.size:
                    break
                copy.write(chunk)
    except FileNotFoundError as err:
        raise SignatureError(f"{source} went away while it was loaded", _RETRY) from err
    if listed is not None and (size, digest.hexdigest()) != (listed.size, listed.sha256):
        raise _not_as_listed(source, listed)


def _not_as_listed(path: Path, listed: FileEntry) -> SignatureError:
    return SignatureError(
        f"{path} is no longer the file that {MANIFEST_NAME} lists (sha256 {listed.sha256[:12]}…)", _RETRY
    )
