"""The folder itself: links, names, code, pickles, sizes, and what the manifest does not list."""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from adapterhub.errors import ManifestError, SignatureError
from adapterhub.packaging.adapter import CONFIG_NAME
from adapterhub.packaging.files import check_relative_path
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release, is_unlisted
from adapterhub.packaging.scan.findings import Finding, quote
from adapterhub.packaging.scan.pickles import SUFFIXES, looks_like_pickle, read_pickle

MAX_FILES = 10_000
_MAX_TEXT_BYTES = 64 * 1024 * 1024
_TEXTS = (".json", ".jsonl", ".jinja", ".txt", ".md", ".html", ".yaml", ".yml", ".toml")
_CODE = (".py", ".pyc", ".pyd", ".pyx", ".so", ".dll", ".dylib", ".exe")
_SCRIPTS = (".sh", ".bash", ".bat", ".ps1", ".js", ".ipynb", ".pth")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst", ".rar")
# The names that loaders open as weights when they find them.
_WEIGHT_PICKLES = ("adapter_model.bin", "pytorch_model*.bin", "pytorch_lora_weights.bin", "model*.bin")
_FROM_SOURCE = "take the folder from its source again, or leave it alone"


def list_entries(folder: Path) -> list[str]:
    """The sorted relative POSIX paths of everything below ``folder`` but plain folders."""
    found = []
    for root, folders, names in os.walk(folder):
        here = Path(root)
        links = [name for name in folders if (here / name).is_symlink()]
        found += [(here / name).relative_to(folder).as_posix() for name in (*names, *links)]
        if len(found) > MAX_FILES:
            break
    return sorted(found)


def is_plain_file(folder: Path, name: str) -> bool:
    """Whether ``name`` may be read: a file, soundly named, of a sane size, no link leading elsewhere."""
    try:
        check_relative_path(name)
    except ValueError:
        return False
    path = folder / name
    return not _leads_out(folder, path) and path.is_file() and not _is_oversized(path)


def scan_entries(folder: Path, entries: list[str]) -> Iterator[Finding]:
    """What the names and kinds of ``entries`` (of ``list_entries``) say; pickles are read, not opened."""
    if len(entries) > MAX_FILES:
        yield Finding(
            "high",
            "too-many-files",
            f"over {MAX_FILES} files",
            ".",
            "an adapter has a few dozen files at most",
        )
        return
    yield from _twins(entries)
    for name in entries:
        try:
            check_relative_path(name)
        except ValueError as err:
            yield Finding("high", "name", quote(err), quote(name), "rename it, or leave the folder alone")
            continue
        if not name.isascii() and PurePosixPath(name).suffix in (*_TEXTS, ".safetensors", ".model"):
            what = "its name has letters beyond ASCII, and may look like another file's"
            yield Finding("medium", "name-letters", what, name, "rename it to what it is")
        kind = _kind(folder, name)
        yield from [kind] if kind is not None else _content(folder, name)


def scan_listing(folder: Path, entries: list[str], *, contents: bool) -> Iterator[Finding]:
    """What differs from the manifest, if there is one; files are hashed when ``contents`` says so."""
    if not (folder / MANIFEST_NAME).is_file():
        yield Finding(
            "info",
            "no-manifest",
            f"there is no {MANIFEST_NAME}: nothing binds these files to a base or a maker",
            ".",
            "compare the files with their source's",
        )
        return
    try:
        manifest = Manifest.read(folder)
    except ManifestError as err:
        yield Finding("high", "manifest", quote(err.what), MANIFEST_NAME, err.fix)
        return
    for name in entries:
        if name not in manifest.files and not is_unlisted(name):
            fix = "remove what does not belong to the release"
            yield Finding("high", "not-listed", f"{MANIFEST_NAME} does not list it", quote(name), fix)
    if contents:
        release = Release(folder, manifest)
        for name in sorted(manifest.files):
            try:
                release.check_files([name])
            except SignatureError as err:
                yield Finding("high", "not-as-listed", quote(err.what), name, err.fix)


def _twins(entries: list[str]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for name in entries:
        twin = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if twin != name:
            what = f"one file with {quote(twin)} on some systems: which is read depends on the machine"
            yield Finding("high", "name-twins", what, quote(name), "remove one of the two")


def _kind(folder: Path, name: str) -> Finding | None:
    """What is said of an entry whose content must not be opened; None for a plain file."""
    path = folder / name
    if _leads_out(folder, path):
        target = quote(path.readlink()) if path.is_symlink() else "a folder that is a link"
        what = f"a link that leaves the folder ({target})"
        return Finding("high", "link", what, name, "replace it by the file it should be")
    if not path.exists():
        return Finding("medium", "link-broken", "a link to nothing", name, _FROM_SOURCE)
    if not path.is_file():
        what = "a pipe, a device or a linked folder, not a file"
        return Finding("high", "not-a-file", what, name, "remove it")
    return None


def _leads_out(folder: Path, path: Path) -> bool:
    """Whether ``path`` is (or lies behind) a link to outside; a Hub cache's own blobs count as inside."""
    real = path.resolve()
    root = folder.resolve()
    if real.is_relative_to(root):
        return False
    # huggingface_hub keeps models--o--n/snapshots/<commit>/file -> ../../blobs/<digest>
    return root.parent.name != "snapshots" or real.parent != root.parent.parent / "blobs"


def _is_oversized(path: Path) -> bool:
    return path.suffix.lower() in _TEXTS and path.stat().st_size > _MAX_TEXT_BYTES


def _content(folder: Path, name: str) -> Iterator[Finding]:
    path, pure = folder / name, PurePosixPath(name)
    suffix = pure.suffix.lower()
    if suffix in _CODE:
        what = "code beside the weights: loaders run it under trust_remote_code"
        yield Finding("high", "code", what, name, "remove it; never set trust_remote_code")
    elif suffix in SUFFIXES or looks_like_pickle(path):
        yield _pickle(path, name)
    elif suffix in _SCRIPTS:
        yield Finding("medium", "script", "a script; nothing needs it to load the adapter", name, "remove it")
    elif suffix in _ARCHIVES:
        what = "an archive: it is never unpacked, and what is in it was not looked at"
        yield Finding("low", "archive", what, name, "remove it, or unpack it and scan that folder")
    elif _is_oversized(path):
        what = f"{path.stat().st_size} bytes of text: reading it could take all memory"
        yield Finding("high", "oversized", what, name, f"at most {_MAX_TEXT_BYTES} bytes are read")


def _pickle(path: Path, name: str) -> Finding:
    pickle = read_pickle(path)
    safer = f"`adapterhub convert {quote(shlex.quote(str(path)))} --out DIR` makes safetensors of it"
    if pickle.calls:
        what = f"a pickle that calls {quote(', '.join(pickle.calls[:4]))} when it is opened"
        return Finding("high", "pickle-calls", what, name, "do not open it; tell whoever hosts it")
    if any(PurePosixPath(path.name).match(pattern) for pattern in _WEIGHT_PICKLES):
        return Finding("high", "pickle", "weights as a pickle, which can run code when opened", name, safer)
    imports = f"; imports {quote(', '.join(pickle.imports[:4]))}" if pickle.imports else ""
    unread = "" if pickle.readable else "; it cannot be read to its end"
    what = f"a pickle, which can run code when opened{imports}{unread}"
    return Finding("medium", "pickle", what, name, f"nothing needs it to load {CONFIG_NAME}: remove it")
