"""Discussions and pull requests of one repository, each a JSON file beside its git objects.

A pull request is a branch, ``refs/pr/N``, and the commit it started from.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

from dulwich.patch import write_tree_diff

from adapterhub.hub.server.commits import check_tree
from adapterhub.hub.server.files import replace_file
from adapterhub.hub.server.refusals import Refusal, bad_request, conflict
from adapterhub.hub.server.repository import Files, Repository

_MAX_DIFF_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Discussion:
    """A discussion, or a pull request when it has a ``base``."""

    num: int
    title: str
    author: str
    created: str
    """ISO 8601, UTC"""
    status: str
    """``open``, ``draft``, ``closed`` or ``merged``"""
    events: tuple[dict[str, Any], ...]
    """what happened, oldest first, as the API gives it"""
    base: str | None = None
    """the commit that the pull request started from"""
    target: str = "main"
    """the branch it is to be merged into"""
    merge_commit: str | None = field(default=None)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


class Discussions:
    """The discussions of an open repository. Writers hold the store's lock."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._folder = repository.path / "discussions"

    def all(self) -> list[Discussion]:
        """Newest first."""
        numbers = sorted((int(path.stem) for path in self._folder.glob("[0-9]*.json")), reverse=True)
        return [self.get(number) for number in numbers]

    def get(self, number: int) -> Discussion:
        """Raises Refusal (404) when there is none of that number."""
        try:
            document = json.loads((self._folder / f"{number}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Refusal(404, f"Discussion {number} not found") from None
        return Discussion(**{**document, "events": tuple(document["events"])})

    def open_discussion(self, author: str, title: str, description: str) -> int:
        return self._new(author, title, description, "open", None, "main")

    def open_pull_request(
        self,
        author: str,
        title: str,
        description: str,
        base: str,
        head: str,
        target: str,
        status: str = "open",
    ) -> int:
        """A pull request with ``head`` as its tip -> its number."""
        if self._repository.ref(f"refs/heads/{target}") is None:
            raise bad_request(f"A pull request is made against a branch, and {target} is none")
        return self._new(author, title, description, status, (base, head), target)

    def _new(
        self,
        author: str,
        title: str,
        description: str,
        status: str,
        commits: tuple[str, str] | None,
        target: str,
    ) -> int:
        # Taken by a file or by a ref: a process killed between the two must not see a number used again.
        taken = [discussion.num for discussion in self.all()]
        taken += [int(name) for name in self._repository.refs("refs/pr/") if name.isdigit()]
        number = max(taken, default=0) + 1
        events = (_comment(author, description),) if description else ()
        base, head = commits or (None, None)
        if head is not None:
            self._repository.move_ref(f"refs/pr/{number}", None, head)
        self._write(Discussion(number, title, author, _now(), status, events, base, target))
        return number

    def comment(self, number: int, author: str, text: str) -> dict[str, Any]:
        return self._add_event(self.get(number), _comment(author, text))

    def rename(self, number: int, author: str, title: str) -> dict[str, Any]:
        discussion = self.get(number)
        data = {"from": discussion.title, "to": title}
        return self._add_event(replace(discussion, title=title), _event("title-change", author, data))

    def change_status(self, number: int, author: str, status: str) -> dict[str, Any]:
        discussion = self.get(number)
        if status not in ("open", "closed") or discussion.status == "merged":
            raise bad_request(f"A {discussion.status} discussion cannot become {status!r}")
        return self._add_event(
            replace(discussion, status=status), _event("status-change", author, {"status": status})
        )

    def diff(self, discussion: Discussion) -> str:
        """What the pull request changes, as git prints it; large files show as their pointers."""
        repository = self._repository
        head = repository.ref(discussion.ref)
        if discussion.base is None or head is None:
            return ""
        out = BytesIO()
        trees = [repository.tree_id(commit).encode() for commit in (discussion.base, head)]
        write_tree_diff(out, repository.objects, *trees)
        return out.getvalue()[:_MAX_DIFF_BYTES].decode("utf-8", "replace")

    def conflicts(self, discussion: Discussion) -> list[str]:
        """Files that the pull request and its target both changed, differently."""
        return self._merged(discussion)[1] if discussion.status in ("open", "draft") else []

    def merge(self, number: int, author: str, author_line: str, comment: str) -> str:
        """Put the pull request's changes on its target in one commit -> its id. Refuses conflicts (409)."""
        discussion = self.get(number)
        if discussion.base is None or discussion.status not in ("open", "draft"):
            raise bad_request(f"#{number} is not an open pull request")
        files, conflicting = self._merged(discussion)
        if conflicting:
            raise conflict(
                f"#{number} cannot be merged: {discussion.target} changed the same files: {conflicting}"
            )
        check_tree(files)
        repository = self._repository
        target = f"refs/heads/{discussion.target}"
        head = repository.commit_id(target)
        message = f"{discussion.title} (#{number})" + (f"\n\n{comment}" if comment else "")
        commit = repository.write_commit(files, [head], author_line, message)
        repository.move_ref(target, head, commit)
        merged = replace(discussion, status="merged", merge_commit=commit)
        self._add_event(merged, _event("status-change", author, {"status": "merged"}))
        return commit

    def _merged(self, discussion: Discussion) -> tuple[Files, list[str]]:
        """The target's files with the pull request's changes -> (files, conflicting paths)."""
        repository = self._repository
        head, target = repository.ref(discussion.ref), repository.ref(f"refs/heads/{discussion.target}")
        if discussion.base is None or head is None or target is None:
            raise bad_request(f"#{discussion.num} has no branch, or its target {discussion.target} is gone")
        base, ours, theirs = (repository.files(commit) for commit in (discussion.base, target, head))
        merged, conflicting = dict(ours), []
        for path in sorted(base.keys() | theirs.keys()):
            old, new, current = base.get(path), theirs.get(path), ours.get(path)
            if new in (old, current):
                continue
            if current != old:
                conflicting.append(path)
            elif new is None:
                del merged[path]
            else:
                merged[path] = new
        return merged, conflicting

    def _add_event(self, discussion: Discussion, event: dict[str, Any]) -> dict[str, Any]:
        self._write(replace(discussion, events=(*discussion.events, event)))
        return event

    def _write(self, discussion: Discussion) -> None:
        self._folder.mkdir(exist_ok=True)
        replace_file(
            self._folder / f"{discussion.num}.json", json.dumps(asdict(discussion), indent=1).encode()
        )


def _comment(author: str, text: str) -> dict[str, Any]:
    latest = {"raw": text, "html": "", "updatedAt": _now(), "author": {"name": author}}
    return _event(
        "comment", author, {"edited": False, "hidden": False, "latest": latest, "history": [latest]}
    )


def _event(type_: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": secrets.token_hex(12),
        "type": type_,
        "createdAt": _now(),
        "author": {"name": author},
        "data": data,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
