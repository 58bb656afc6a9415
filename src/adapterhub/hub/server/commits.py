"""One commit as the client sends it: lines of JSON, one operation each, that land together or not at all."""

from __future__ import annotations

import base64
import binascii
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from dulwich.objects import Blob

from adapterhub.hub.server import xet
from adapterhub.hub.server.attributes import add_large_files, large_file_matcher
from adapterhub.hub.server.documents import parse_json
from adapterhub.hub.server.lfs import LargeFiles, is_digest
from adapterhub.hub.server.limits import Limits
from adapterhub.hub.server.names import check_path
from adapterhub.hub.server.refusals import Refusal, bad_request, too_large
from adapterhub.hub.server.repository import FILE_MODE, Files, Pointer, Repository

_LOOSE_MAX = 100  # more new objects than this go into one pack, as git's own receive does
_PACK_BYTES = 32 << 20  # new contents held in memory before they are written out


@dataclass(frozen=True, slots=True)
class Operation:
    """One change of a commit."""

    path: str
    blob: bytes | None
    """id of the blob that stands there afterwards; None deletes"""
    folder: bool = False
    """True when a whole folder goes"""
    large: str | None = None
    """sha256 of the large file that the blob points to"""


@dataclass(frozen=True, slots=True)
class Draft:
    """A commit that was read and whose blobs are written, but that nothing points to."""

    message: str
    """summary, blank line, description"""
    title: str
    """its summary alone"""
    description: str
    parent: str | None
    """the commit that the client saw at the branch's tip, when it said so"""
    operations: tuple[Operation, ...]


def read_draft(lines: BinaryIO, repository: Repository, limits: Limits) -> Draft:
    """Read the client's lines and write their blobs. Raises Refusal (400, 413) on anything malformed."""
    rows = _rows(lines, limits)
    key, header = next(rows, ("", {}))
    if key != "header":
        raise bad_request("A commit starts with a header line")
    title = _text(header, "summary").strip()
    if not title:
        raise bad_request("A commit needs a summary")
    description = header.get("description") or ""
    parent = header.get("parentCommit")
    if not isinstance(description, str) or not (parent is None or isinstance(parent, str)):
        raise bad_request("description and parentCommit are text")
    writer = _BlobWriter(repository)
    operations = _operations(rows, repository, writer, limits)
    writer.finish()
    message = f"{title}\n\n{description}" if description else title
    return Draft(message, title, description, parent, operations)


def apply_draft(repository: Repository, draft: Draft, head: str, author: str) -> str:
    """Write the commit on top of ``head`` -> its id; ``head`` itself when nothing changes."""
    files = repository.files(head)
    before = dict(files)
    for operation in draft.operations:
        _apply(operation, files, head)
    _name_large_files(repository, draft.operations, files)
    check_tree(files)
    if files == before:
        return head
    return repository.write_commit(files, [head], author, draft.message)


def check_tree(files: Iterable[str]) -> None:
    """Refuse a tree in which one path is both a file and a folder."""
    paths = set(files)
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder:
            if folder in paths:
                raise bad_request(f"{folder} would be both a file and a folder (of {path})")
            folder = folder.rpartition("/")[0]


def _rows(lines: BinaryIO, limits: Limits) -> Iterator[tuple[str, dict[str, Any]]]:
    while line := lines.readline(limits.commit_line + 1):
        if len(line) > limits.commit_line:
            raise too_large(
                f"A file in the commit is larger than {limits.regular_file} bytes: upload it through LFS"
            )
        if not line.strip():
            continue
        row = parse_json(line)
        key, value = (row.get("key"), row.get("value")) if isinstance(row, dict) else (None, None)
        if not isinstance(key, str) or not isinstance(value, dict):
            raise bad_request("A line of the commit is not a JSON object with key and value")
        yield key, value


def _text(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise bad_request(f"A line of the commit lacks the text {name!r}")
    return text


def _operations(
    rows: Iterable[tuple[str, dict[str, Any]]], repository: Repository, writer: _BlobWriter, limits: Limits
) -> tuple[Operation, ...]:
    operations: list[Operation | tuple[str, dict[str, Any]]] = []
    for key, value in rows:
        path = _text(value, "path")
        if key == "file":
            operations.append(Operation(check_path(path), writer.add(_content(value, limits))))
        elif key == "lfsFile":
            operations.append((check_path(path), value))
        elif key == "deletedFile":
            operations.append(Operation(path, None))
        elif key == "deletedFolder":
            operations.append(Operation(path.strip("/"), None, folder=True))
        else:
            raise bad_request(f"Unknown operation {key!r} in the commit")
    large_files = LargeFiles(repository.path)
    xet.restore(large_files, [_oid(*it) for it in operations if isinstance(it, tuple)])
    return tuple(
        it if isinstance(it, Operation) else _point(it[0], _pointer(*it, large_files), writer)
        for it in operations
    )


def _point(path: str, pointer: Pointer, writer: _BlobWriter) -> Operation:
    return Operation(path, writer.add(pointer.encode()), large=pointer.sha256)


def _content(value: dict[str, Any], limits: Limits) -> bytes:
    content = _text(value, "content")
    encoding = value.get("encoding", "utf-8")
    try:
        data = base64.b64decode(content, validate=True) if encoding == "base64" else content.encode("utf-8")
    except (binascii.Error, ValueError):
        raise bad_request(f"The content of {value['path']!r} cannot be decoded") from None
    if encoding not in ("base64", "utf-8"):
        raise bad_request(f"Unknown encoding {encoding!r}")
    if len(data) > limits.regular_file:
        raise too_large(
            f"{value['path']!r} has {len(data)} bytes: files over {limits.regular_file} go through LFS"
        )
    return data


def _oid(path: str, value: dict[str, Any]) -> str:
    oid = value.get("oid")
    if value.get("algo", "sha256") != "sha256" or not isinstance(oid, str) or not is_digest(oid):
        raise bad_request(f"{path!r}: an LFS file is named by its sha256, 64 lower-case hex digits")
    return oid


def _pointer(path: str, value: dict[str, Any], large_files: LargeFiles) -> Pointer:
    oid = _oid(path, value)
    size = large_files.size(oid)
    if size is None:
        hint = "; from another machine than the Hub's, upload with HF_HUB_DISABLE_XET=1"
        raise bad_request(f"{path!r}: the LFS object {oid} was not uploaded to this repository{hint}")
    announced = value.get("size", size)
    if announced != size:
        raise bad_request(f"{path!r}: the LFS object {oid} has {size} bytes, not {announced}")
    return Pointer(oid, size)


def _apply(operation: Operation, files: Files, head: str) -> None:
    if operation.blob is not None:
        old_mode = files.get(operation.path, (FILE_MODE, b""))[0]
        mode = old_mode if stat.S_ISREG(old_mode) else FILE_MODE
        files[operation.path] = (mode, operation.blob)
        return
    if operation.folder:
        prefix = f"{operation.path}/" if operation.path not in ("", ".") else ""
        doomed = [path for path in files if path.startswith(prefix)]
    else:
        doomed = [operation.path] if operation.path in files else []
    if not doomed:
        raise Refusal(
            404,
            f"Cannot delete {operation.path!r}: it is not there",
            "EntryNotFound",
            {"X-Repo-Commit": head},
        )
    for path in doomed:
        del files[path]


def _name_large_files(repository: Repository, operations: Iterable[Operation], files: Files) -> None:
    """Give .gitattributes a line for each large file that no pattern there covers."""
    mode, oid = files.get(".gitattributes", (FILE_MODE, b""))
    attributes = repository.read(oid.decode()) if oid else b""
    covers = large_file_matcher(attributes)
    missing = [
        operation.path
        for operation in dict.fromkeys(operations)
        if operation.large and operation.path in files and not covers(operation.path)
    ]
    if missing:
        files[".gitattributes"] = (mode, repository.write_blob(add_large_files(attributes, missing)))


class _BlobWriter:
    """Writes blobs: a few as loose objects, many as packs, in bounded memory."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._objects = repository.objects
        self._waiting: dict[bytes, Blob] = {}
        self._bytes = 0

    def add(self, data: bytes) -> bytes:
        blob = Blob.from_string(data)
        if blob.id not in self._waiting and blob.id not in self._objects:
            self._waiting[blob.id] = blob
            self._repository.note_blob(blob.id, data)
            self._bytes += len(data)
            if self._bytes > _PACK_BYTES:
                self.finish()
        oid: bytes = blob.id
        return oid

    def finish(self) -> None:
        if len(self._waiting) > _LOOSE_MAX:
            self._objects.add_objects([(blob, None) for blob in self._waiting.values()])
        else:
            for blob in self._waiting.values():
                self._objects.add_object(blob)
        self._waiting.clear()
        self._bytes = 0
