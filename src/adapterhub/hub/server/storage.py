"""The Hub's root folder: which repositories there are, their settings, and one lock for each.

::

    ROOT/lock                             held while a Hub serves this root: one process at a time
    ROOT/secret                           the key that signs upload addresses
    ROOT/accounts.json                    digests of tokens
    ROOT/tmp/                             what is being made or deleted; emptied at start
    ROOT/{models,datasets,spaces}/OWNER/NAME.git    a bare git repository, with three things of ours in it:
        hub.json                          settings
        discussions/N.json                discussions and pull requests
        lfs/objects/ab/cd/SHA256          large files, where git-lfs itself keeps them
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dulwich.repo import Repo

from adapterhub.errors import HubError
from adapterhub.hub.server.files import replace_file, sync_folder
from adapterhub.hub.server.lfs import LargeFiles
from adapterhub.hub.server.names import KINDS, RepoId
from adapterhub.hub.server.refusals import conflict, repo_not_found
from adapterhub.hub.server.repository import Repository, commit_first_files

SETTINGS_FILE = "hub.json"
_LEFTOVERS = (
    "*.lock",
    ".*.tmp",
    "refs/**/*.lock",
    "objects/??/*.lock",
    "objects/pack/*.lock",
    "objects/pack/tmp*",
    "discussions/.*.tmp",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is kept about a repository beside its contents."""

    created: str
    """ISO 8601, UTC"""
    private: bool = False
    gated: str | bool = False
    """False, ``auto`` or ``manual``; either of these means: files only for members and for ``granted``"""
    granted: tuple[str, ...] = ()
    """users let into a gated repository"""


class Store:
    """The repositories below one root folder. Safe to use from many threads of one process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._locks: dict[str, threading.RLock] = {}
        self._swept: set[RepoId] = set()
        self._generations: dict[RepoId, int] = {}
        self._guard = threading.Lock()
        self._temporary = root / "tmp"
        self._held = _hold(root)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()

    def close(self) -> None:
        os.close(self._held)

    def temporary_path(self) -> Path:
        """A new path on the same file system, gone at the next start if nobody moves it away."""
        return self._temporary / secrets.token_hex(12)

    def path(self, repo: RepoId) -> Path:
        return self.root / repo.folder

    def exists(self, repo: RepoId) -> bool:
        return (self.path(repo) / SETTINGS_FILE).is_file()

    def generation(self, repo: RepoId) -> int:
        """A number that changes when another repository, or none, stands under this name."""
        return self._generations.get(repo, 0)

    def went_away(self, repo: RepoId, generation: int) -> bool:
        """Whether the repository was deleted or moved since. Readers hold no lock: who fails asks this."""
        with self.lock(repo):
            return self.generation(repo) != generation

    def _renew(self, *repos: RepoId) -> None:
        for repo in repos:
            self._generations[repo] = self._generations.get(repo, 0) + 1

    @contextlib.contextmanager
    def lock(self, *repos: RepoId) -> Iterator[None]:
        """Hold off other writers of these repositories; always taken in one order."""
        with contextlib.ExitStack() as stack:
            for folder in sorted({repo.folder for repo in repos}):
                stack.enter_context(self._lock(folder))
            yield

    def lock_object(self, repo: RepoId, oid: str) -> contextlib.AbstractContextManager[bool]:
        """Hold off others who put the same large file together."""
        return self._lock(f"{repo.folder}/{oid}")

    def _lock(self, name: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(name, threading.RLock())

    @contextlib.contextmanager
    def open(self, repo: RepoId) -> Iterator[Repository]:
        """The repository's contents."""
        self._clear_once(repo)
        path = self.path(repo)
        with contextlib.closing(Repo(str(path))) as git:
            yield Repository(git, path)

    def large_files(self, repo: RepoId) -> LargeFiles:
        self._clear_once(repo)
        return LargeFiles(self.path(repo))

    def _clear_once(self, repo: RepoId) -> None:
        """Clear what a killed process left behind, before this one first touches the repository."""
        if repo not in self._swept:
            with self.lock(repo):
                if repo not in self._swept and self.exists(repo):
                    _clear_leftovers(self.path(repo))
                    self._swept.add(repo)

    def create(self, repo: RepoId, *, private: bool, author: str) -> None:
        """Make a repository with its first commit, or none at all. Raises Refusal (409) when it exists."""
        staged = self.temporary_path()
        staged.mkdir()
        with contextlib.closing(Repo.init_bare(str(staged), default_branch=b"main")) as git:
            config = git.get_config()
            config.set((b"core",), b"fsyncObjectFiles", True)
            config.write_to_path()
        with contextlib.closing(Repo(str(staged))) as git:
            commit_first_files(git, author)
        created = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        _write_settings(staged, Settings(created=created, private=private))
        with self.lock(repo):
            if self.exists(repo):
                shutil.rmtree(staged)
                raise conflict(f"Repository {repo.full_name} already exists")
            self._move_into_place(staged, self.path(repo))
            self._swept.add(repo)
            self._renew(repo)

    def delete(self, repo: RepoId) -> None:
        """Remove it with everything in it. Raises Refusal (404) when somebody else just did."""
        doomed = self.temporary_path()
        with self.lock(repo):
            self._check_exists(repo)
            self.path(repo).rename(doomed)
            self._swept.discard(repo)
            self._renew(repo)
        shutil.rmtree(doomed)

    def move(self, source: RepoId, target: RepoId) -> None:
        """Give it another name. Raises Refusal: 409 when that is taken, 404 when it is gone."""
        with self.lock(source, target):
            self._check_exists(source)
            if self.exists(target):
                raise conflict(f"Repository {target.full_name} already exists")
            self._move_into_place(self.path(source), self.path(target))
            self._swept.discard(source)
            self._swept.add(target)
            self._renew(source, target)

    def _check_exists(self, repo: RepoId) -> None:
        if not self.exists(repo):
            raise repo_not_found(repo.full_name, signed_in=True)

    def settings(self, repo: RepoId) -> Settings:
        document = json.loads((self.path(repo) / SETTINGS_FILE).read_text(encoding="utf-8"))
        return Settings(**{**document, "granted": tuple(document["granted"])})

    def save_settings(self, repo: RepoId, settings: Settings) -> None:
        """Replace the settings; who changes them holds the repository's lock from reading to saving."""
        _write_settings(self.path(repo), settings)

    def repos(self, kind: str) -> Iterator[RepoId]:
        """Every repository of one type, by owner and name."""
        folder = self.root / KINDS[kind]
        for path in sorted(folder.glob("*/*.git")):
            repo = RepoId(kind, path.parent.name, path.name.removesuffix(".git"))
            if self.exists(repo):
                yield repo

    def _move_into_place(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        sync_folder(target.parent)


def _write_settings(folder: Path, settings: Settings) -> None:
    replace_file(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=2).encode() + b"\n")


def _hold(root: Path) -> int:
    """Lock the root for this process -> the open descriptor. Raises HubError when another Hub serves it."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise HubError(
            f"{root} is served by another process", "stop that Hub, or serve another folder"
        ) from None
    return descriptor


def _clear_leftovers(path: Path) -> None:
    """Remove lock files and unfinished objects: this process alone writes here, and has not begun."""
    shutil.rmtree(path / "lfs" / "incomplete", ignore_errors=True)
    for pattern in _LEFTOVERS:
        for leftover in path.glob(pattern):
            leftover.unlink(missing_ok=True)
