"""A release folder: made whole, opened, checked file by file, and added to."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from adapterhub.errors import ReleaseError, SignatureError
from adapterhub.packaging.bundles import is_signature
from adapterhub.packaging.files import list_files, sha256_file, sha256_files, staged_folder, write_atomic
from adapterhub.packaging.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest


def is_unlisted(name: str) -> bool:
    """Whether a release holds ``name`` without listing it: the manifest, the signatures, .gitattributes.

    The Hub puts the last into every repository.
    """
    return name in (MANIFEST_NAME, ".gitattributes") or is_signature(name)


@dataclass(frozen=True)
class Release:
    """A release folder and its manifest, as read when it was opened."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> Release:
        """Open a release folder; files are not read yet (``check_files`` does).

        Raises ManifestError when the folder holds no sound manifest.
        """
        return cls(Path(path), Manifest.read(Path(path)))

    @property
    def digest(self) -> str:
        """sha256 of adapterhub.json as it lies there, 64 hex digits; it stands for every listed file."""
        return sha256_file(self.path / MANIFEST_NAME)

    @property
    def is_signed(self) -> bool:
        """Whether a signature file is there; says nothing of whether it holds."""
        return (self.path / SIGNATURE_NAME).is_file()

    @property
    def size(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size for entry in self.manifest.files.values())

    def check_files(
        self, only: Iterable[str] | None = None, *, known: Mapping[str, str] | None = None
    ) -> None:
        """Compare every file (or those in ``only``) with the manifest, by size, then by sha256 on all cores.

        ``known`` is the sha256 of files that the caller has just hashed: they are not read again. Raises
        SignatureError for a file that is missing, changed, or in the folder without being listed.
        """
        listed = self.manifest.files
        if only is None:
            unlisted = [
                name for name in list_files(self.path) if name not in listed and not is_unlisted(name)
            ]
            if unlisted:
                raise SignatureError(
                    f"{self.path} holds what {MANIFEST_NAME} does not list: {_some(unlisted)}",
                    "remove what does not belong to the release, or take it from its source again",
                )
        names = sorted(listed if only is None else only)
        digests = dict(known or {})
        unknown = [name for name in names if name not in digests]
        for name in unknown:
            size = _file_size(self.path / name)
            if size is None:
                what = f"{self.path / name} is listed in {MANIFEST_NAME} but missing"
                again = "; evidence of your own is measured again by `adapterhub eval`"
                raise SignatureError(
                    what, f"take the release again{again if name.startswith('evidence/') else ''}"
                )
            if size != listed[name].size:
                raise self._changed(name)
        digests |= sha256_files(self.path, unknown)
        for name in names:
            if digests[name] != listed[name].sha256:
                raise self._changed(name)

    def _changed(self, name: str) -> SignatureError:
        entry = self.manifest.files[name]
        return SignatureError(
            f"{self.path / name} is not the file that {MANIFEST_NAME} lists "
            f"({entry.size} bytes, sha256 {entry.sha256[:12]}…)",
            "it was changed or damaged: take the release from its source again",
        )

    def with_files(self, contents: Mapping[str, bytes]) -> Release:
        """Add or replace files (evidence, cards), rewrite the manifest, each atomically; return the result.

        The manifest is written last: a crash in between is mended by running the same command again. Raises
        ReleaseError when the release is signed and a content differs, because that would break the signature.
        """
        files = dict(self.manifest.files)
        changed = {}
        for name, data in contents.items():
            entry = FileEntry(sha256=sha256(data).hexdigest(), size=len(data))
            if files.get(name) != entry or not (self.path / name).is_file():
                changed[name] = data
            files[name] = entry
        manifest = self.manifest.model_copy(update={"files": files})
        manifest = Manifest.from_bytes(manifest.to_bytes())  # validates the new names
        if changed and self.is_signed:
            raise ReleaseError(
                f"{self.path} is signed, and this would change {_some(sorted(changed))}",
                f"remove {SIGNATURE_NAME}, do it again, and sign again",
            )
        for name, data in changed.items():
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, data)
        if manifest != self.manifest:
            write_atomic(self.path / MANIFEST_NAME, manifest.to_bytes())
        return Release(self.path, manifest)


@contextmanager
def new_release(path: Path, draft: Manifest, known: Mapping[str, FileEntry] | None = None) -> Iterator[Path]:
    """Make a release at ``path``: fill the yielded folder; it is sealed and renamed when the block ends well.

    ``draft`` is the manifest without its files. ``known`` may be filled inside the block with the entries of
    files that were hashed while they were written; the others are hashed at the end. When the block fails,
    nothing is left behind. Raises ReleaseError when ``path`` exists and is not an empty folder.
    """
    with staged_folder(path) as staging:
        yield staging
        seal_folder(staging, draft, known)


def seal_folder(folder: Path, draft: Manifest, known: Mapping[str, FileEntry] | None = None) -> None:
    """Write the manifest of everything in ``folder``; see ``new_release``."""
    files = {
        name: (known or {}).get(name)
        or FileEntry(sha256=sha256_file(folder / name), size=(folder / name).stat().st_size)
        for name in list_files(folder)
    }
    manifest = Manifest.from_bytes(draft.model_copy(update={"files": files}).to_bytes())
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def _file_size(path: Path) -> int | None:
    """Bytes; None where there is no file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _some(names: list[str]) -> str:
    """At most three names in words."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
