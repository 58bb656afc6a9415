"""Reading and writing one bare git repository: revisions, trees, files, commits, branches and tags."""

from __future__ import annotations

import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dulwich.diff_tree import tree_changes
from dulwich.index import commit_tree
from dulwich.objects import Blob, Commit, Tag, Tree
from dulwich.refs import Ref
from dulwich.repo import Repo

from adapterhub.hub.server.attributes import DEFAULT_ATTRIBUTES
from adapterhub.hub.server.names import check_ref_name, is_commit
from adapterhub.hub.server.refusals import Refusal, conflict, entry_not_found, revision_not_found

FILE_MODE = 0o100644
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d{1,18})\n"
)
_POINTER_MAX = 200
_VERSION = re.compile(r"v\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?")
_RETIRED = "refs/retired/"  # the versions whose tags were deleted, each with the commit that had it


@dataclass(frozen=True, slots=True)
class Pointer:
    """What git holds in place of a large file."""

    sha256: str
    size: int
    """bytes"""

    def encode(self) -> bytes:
        lines = (
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {self.size}",
            "",
        )
        return "\n".join(lines).encode()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file at one commit."""

    path: str
    oid: str
    """git blob id, 40 hex digits"""
    size: int
    """bytes of the file itself, also when git holds a pointer to it"""
    pointer: Pointer | None
    """set when the file lies in large-file storage"""
    pointer_size: int
    """bytes of the blob that git holds"""


# A blob never changes, so what was learnt about one holds for ever: (bytes in git, pointer or None)
_blob_facts: dict[str, tuple[int, Pointer | None]] = {}
_BLOB_FACTS_MAX = 200_000

Files = dict[str, tuple[int, bytes]]
"""path -> (git mode, blob id)"""


class Repository:
    """One open repository. Not shared between threads; writers hold the store's lock."""

    def __init__(self, git: Repo, path: Path) -> None:
        self._git = git
        self.objects = git.object_store
        self.path = path

    # Revisions

    def commit_id(self, revision: str) -> str:
        """A branch, tag, full ref or commit id -> the commit's id. Raises Refusal (RevisionNotFound)."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            found = self._git.refs.read_loose_ref(Ref(name.encode())) if name.startswith("refs/") else None
            if found is None and name.startswith("refs/"):
                found = self._git.refs.get_packed_refs().get(Ref(name.encode()))
            if found is not None:
                return self._peel(found)
        if is_commit(revision) and revision.encode() in self.objects:
            found_object = self.objects[revision.encode()]
            if isinstance(found_object, Commit):
                return revision
        raise revision_not_found(revision)

    def writable_ref(self, revision: str) -> str:
        """The branch or pull request that a commit to ``revision`` moves. Refuses any other revision."""
        for name in (f"refs/heads/{revision}", revision):
            if name.startswith(("refs/heads/", "refs/pr/")) and self.ref(name) is not None:
                return name
        raise revision_not_found(revision)

    def ref(self, name: str) -> str | None:
        """The commit that a full ref names, or None."""
        try:
            return self._peel(self._git.refs[Ref(name.encode())])
        except KeyError:
            return None

    def refs(self, prefix: str) -> dict[str, str]:
        """Name below ``prefix`` (such as ``refs/tags/``) -> commit id, by name."""
        base = Ref(prefix.rstrip("/").encode())
        return {
            name.decode("utf-8", "replace"): self._peel(target)
            for name, target in sorted(self._git.refs.as_dict(base).items())
        }

    def _peel(self, target: bytes) -> str:
        found = self.objects[target]
        while isinstance(found, Tag):
            found = self.objects[found.object[1]]
        return found.id.decode()

    def move_ref(self, name: str, old: str | None, new: str) -> None:
        """Set ``name`` to ``new`` if it still is ``old`` (None: if it is new); else 412 or 409."""
        reference = Ref(name.encode())
        if old is None:
            if not self._git.refs.add_if_new(reference, new.encode()):
                raise conflict(f"{name} already exists")
        elif not self._git.refs.set_if_equals(reference, old.encode(), new.encode()):
            raise Refusal(
                412, f"{name} was moved by somebody else; fetch it and try again", "PreconditionFailed"
            )

    def create_branch(self, name: str, commit: str) -> None:
        self._check_new_name(name)
        self.move_ref(f"refs/heads/{name}", None, commit)

    def create_tag(self, name: str, commit: str, message: str | None, author: str) -> None:
        """A lightweight tag, or with a message an annotated one. Refuses a name that is taken (409).

        A version that was deleted stays taken, except by the commit that had it.
        """
        self._check_new_name(name)
        retired = self.ref(_RETIRED + name)
        if retired not in (None, commit):
            raise conflict(f"{name} was the version of commit {retired}, and a version is never used again")
        target = commit
        if message:
            tag = Tag()
            tag.name, tag.message, tag.tagger = name.encode(), message.encode() + b"\n", author.encode()
            tag.object = (Commit, commit.encode())
            tag.tag_time, tag.tag_timezone = int(time.time()), 0
            self.objects.add_object(tag)
            target = tag.id.decode()
        self.move_ref(f"refs/tags/{name}", None, target)

    def delete_tag(self, name: str) -> None:
        """Take a tag away; of a version it is kept what it named, under a ref that the API does not show."""
        commit = self.ref(f"refs/tags/{name}")
        if commit is not None and _VERSION.fullmatch(name):
            self._git.refs[Ref(f"{_RETIRED}{name}".encode())] = commit.encode()
        self.delete_ref(f"refs/tags/{name}")

    def delete_ref(self, name: str) -> None:
        reference = Ref(name.encode())
        if reference not in self._git.refs:
            raise revision_not_found(name.split("/", 2)[2])
        self._git.refs.remove_if_equals(reference, None)

    def _check_new_name(self, name: str) -> None:
        """Branches and tags share one space of names here: a branch can never stand before a version."""
        check_ref_name(name)
        for kind in ("heads", "tags"):
            for taken in self.refs(f"refs/{kind}/"):
                if taken == name:
                    what = "Branch" if kind == "heads" else "Tag"
                    raise conflict(f"{what} {name} already exists")
                if taken.startswith(f"{name}/") or name.startswith(f"{taken}/"):
                    raise conflict(
                        f"{name} cannot be beside {taken}: git would need a file and a folder of one name"
                    )

    # Commits

    def commit(self, commit: str) -> Commit:
        return self.objects[commit.encode()]

    def commit_date(self, commit: str) -> str:
        """ISO 8601, UTC, milliseconds: 2026-01-02T03:04:05.000Z."""
        return _iso(self.commit(commit).commit_time)

    def history(self, commit: str) -> Iterator[Commit]:
        """The commit and its first parents, newest first."""
        current: Commit | None = self.commit(commit)
        while current is not None:
            yield current
            current = self.objects[current.parents[0]] if current.parents else None

    def last_changes(self, commit: str, paths: list[str]) -> dict[str, Commit]:
        """For each path (a file or folder at ``commit``), the newest commit that changed something there."""
        missing, found = set(paths), {}
        for current in self.history(commit):
            parent = self.objects[current.parents[0]] if current.parents else None
            for change in tree_changes(
                self.objects, parent.tree if parent else None, current.tree, include_trees=True
            ):
                path = ((change.new or change.old).path or b"").decode("utf-8", "replace")
                if path in missing:
                    found[path] = current
                    missing.discard(path)
            if not missing:
                break
        return found

    def write_commit(self, files: Files, parents: list[str], author: str, message: str) -> str:
        """Write the trees and the commit (nothing points to it yet) -> its id."""
        commit = Commit()
        commit.tree = commit_tree(
            self.objects, [(path.encode(), oid, mode) for path, (mode, oid) in files.items()]
        )
        commit.parents = [parent.encode() for parent in parents]
        commit.author = commit.committer = author.encode()
        commit.author_time = commit.commit_time = int(time.time())
        commit.author_timezone = commit.commit_timezone = 0
        commit.encoding = b"UTF-8"
        commit.message = message.encode("utf-8", "replace")
        self.objects.add_object(commit)
        return commit.id.decode()

    # Contents

    def files(self, commit: str) -> Files:
        """Every file at a commit, by path."""
        return {path: (mode, oid) for path, mode, oid in self._walk(self.commit(commit).tree, "")}

    def tree_id(self, commit: str) -> str:
        return self.commit(commit).tree.decode()

    def _walk(self, tree: bytes, prefix: str) -> Iterator[tuple[str, int, bytes]]:
        for name, mode, oid in self.objects[tree].items():
            path = prefix + name.decode("utf-8", "replace")
            if stat.S_ISDIR(mode):
                yield from self._walk(oid, path + "/")
            elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                yield path, mode, oid

    def lookup(self, commit: str, path: str) -> tuple[int, bytes]:
        """(mode, object id) of a file or folder. Raises Refusal (EntryNotFound)."""
        mode, oid = stat.S_IFDIR, self.commit(commit).tree
        for part in path.split("/") if path else []:
            found = self.objects[oid] if stat.S_ISDIR(mode) else None
            if not isinstance(found, Tree) or part.encode("utf-8", "surrogatepass") not in found:
                raise entry_not_found(path, commit)
            mode, oid = found[part.encode()]
        return mode, oid

    def folder(self, oid: bytes) -> Tree:
        return self.objects[oid]

    def file(self, commit: str, path: str) -> Entry:
        """The file at ``path``. Raises Refusal (EntryNotFound), also for a folder."""
        mode, oid = self.lookup(commit, path)
        if stat.S_ISDIR(mode) or oid not in self.objects:
            raise entry_not_found(path, commit)
        return self.entry(path, oid)

    def entry(self, path: str, oid: bytes) -> Entry:
        pointer_size, pointer = self._facts(oid)
        size = pointer.size if pointer else pointer_size
        return Entry(path, oid.decode(), size, pointer, pointer_size)

    def read(self, oid: str) -> bytes:
        return self.objects.get_raw(oid.encode())[1]

    def write_blob(self, data: bytes) -> bytes:
        blob = Blob.from_string(data)
        self.objects.add_object(blob)
        return blob.id

    def note_blob(self, oid: bytes, data: bytes) -> tuple[int, Pointer | None]:
        """Remember of a blob what listings tell: it need not be read for them."""
        facts = (len(data), parse_pointer(data))
        if len(_blob_facts) >= _BLOB_FACTS_MAX:
            _blob_facts.clear()
        _blob_facts[oid.decode()] = facts
        return facts

    def _facts(self, oid: bytes) -> tuple[int, Pointer | None]:
        return _blob_facts.get(oid.decode()) or self.note_blob(oid, self.objects.get_raw(oid)[1])


def parse_pointer(data: bytes) -> Pointer | None:
    """The pointer that ``data`` is, exactly as git-lfs writes one; None for any other content."""
    found = _POINTER.fullmatch(data) if len(data) <= _POINTER_MAX else None
    return Pointer(found[1].decode(), int(found[2])) if found else None


def commit_first_files(git: Repo, author: str) -> None:
    """The first commit of a new repository: which files git-lfs keeps."""
    repository = Repository(git, Path(git.path))
    blob = repository.write_blob(DEFAULT_ATTRIBUTES)
    first = repository.write_commit({".gitattributes": (FILE_MODE, blob)}, [], author, "initial commit")
    repository.move_ref("refs/heads/main", None, first)


def describe_commit(commit: Any) -> dict[str, Any]:
    """A commit as the API lists it."""
    title, _, message = commit.message.decode("utf-8", "replace").partition("\n")
    author = commit.author.decode("utf-8", "replace").rpartition(" <")[0]
    return {
        "id": commit.id.decode(),
        "title": title,
        "message": message.strip("\n"),
        "date": _iso(commit.commit_time),
        "authors": [{"user": author}],
    }


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
