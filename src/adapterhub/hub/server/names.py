"""The names a Hub accepts: repositories, branches and tags, paths inside a repository."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dulwich.index import validate_path, validate_path_element_hfs, validate_path_element_ntfs
from dulwich.refs import check_ref_format

from adapterhub.hub.server.refusals import bad_request

# Repository type -> what stands in /api/KIND/… and before the name in page and file addresses
KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}
PAGE_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}

# First parts of addresses that are not a namespace
_RESERVED = {"api", "buckets", "collections", "datasets", "kernels", "lfs", "models", "settings", "spaces"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
NAME_RULE = "use letters, digits, '-', '_' and '.', at most 96 characters, and no reserved word"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 255


@dataclass(frozen=True, slots=True)
class RepoId:
    """A repository's type (model, dataset or space), owner and name."""

    type: str
    owner: str
    name: str

    @property
    def full_name(self) -> str:
        return f"{self.owner}/{self.name}"

    @property
    def folder(self) -> str:
        """Where it lies below the Hub's root."""
        return f"{KINDS[self.type]}/{self.owner}/{self.name}.git"

    @property
    def address(self) -> str:
        """Its page's address below the endpoint, without a leading slash."""
        return f"{PAGE_PREFIXES[self.type]}{self.full_name}"


def is_name(part: str) -> bool:
    """Whether an owner or repository name keeps the Hub's rules (at most 96 of A-Z a-z 0-9 . _ -)."""
    return (
        _NAME.fullmatch(part) is not None
        and not any(bad in part for bad in ("..", "--"))
        and not part.endswith((".", "-", ".git", ".lock"))
    )


def is_owner(part: str) -> bool:
    return is_name(part) and part.lower() not in _RESERVED


def is_commit(revision: str) -> bool:
    """Whether it is a full commit id: 40 lower-case hex digits."""
    return _COMMIT.fullmatch(revision) is not None


def check_repo_name(owner: str, name: str) -> None:
    if not is_owner(owner) or not is_name(name):
        raise bad_request(
            f"Invalid repository name {owner}/{name}: use letters, digits, '-', '_' and '.', at most 96"
            " characters, no '--' or '..', and no reserved word as the owner"
        )


def check_ref_name(name: str) -> None:
    """Refuse a branch or tag name that git refuses, or that reads as a commit or a full ref."""
    reference = b"refs/heads/" + name.encode("utf-8", "surrogatepass")
    if name.startswith(("refs/", "-")) or name == "HEAD" or is_commit(name) or len(reference) > 200:
        raise bad_request(f"Invalid reference name: {name}")
    if not check_ref_format(reference[len(b"refs/") :]):
        raise bad_request(f"Invalid reference name: {name}")


def check_path(path: str) -> str:
    """The path as it is stored, or a refusal: relative, no '..', nothing a checkout could escape with."""
    try:
        raw = path.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("A path in the commit is not valid UTF-8") from None
    parts = raw.split(b"/")
    well_formed = all(part not in (b"", b".", b"..") and len(part) <= _MAX_PART_BYTES for part in parts)
    if (
        not well_formed
        or len(raw) > _MAX_PATH_BYTES
        or b"\\" in raw
        or any(byte < 0x20 or byte == 0x7F for byte in raw)
        or not validate_path(raw, validate_path_element_ntfs)
        or not validate_path(raw, validate_path_element_hfs)
    ):
        raise bad_request(f"Invalid path in repository: {path!r}")
    return path
