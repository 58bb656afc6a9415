"""Who may do what: users, organisations, and their tokens. Only digests of tokens are kept."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import shlex
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from adapterhub.errors import HubError
from adapterhub.hub.server.files import replace_file
from adapterhub.hub.server.names import NAME_RULE, is_owner
from adapterhub.hub.server.refusals import Refusal

FILE_NAME = "accounts.json"


@dataclass(frozen=True, slots=True)
class Account:
    """Who is asking, and what they may do."""

    user: str
    """the user's name, and their own namespace"""
    role: str
    """``read`` or ``write``"""
    orgs: tuple[str, ...] = ()
    """further namespaces whose private repositories they read, and write with the role ``write``"""
    everywhere: bool = False
    """True on an open Hub: every namespace is theirs"""

    def belongs_to(self, namespace: str) -> bool:
        return self.everywhere or namespace == self.user or namespace in self.orgs

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and self.belongs_to(namespace)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One token as it is kept on disk."""

    id: str
    """8 hex digits, to name it when revoking"""
    user: str
    role: str
    sha256: str
    """hex digest of the token"""
    created: str
    """ISO 8601, UTC"""
    orgs: tuple[str, ...] = field(default=())

    def account(self) -> Account:
        return Account(self.user, self.role, self.orgs)


OPEN_ACCOUNT = Account("local", "write", everywhere=True)


def new_record(token: str, user: str, role: str, orgs: Sequence[str]) -> TokenRecord:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return TokenRecord(
        id=digest[:8],
        user=user,
        role=role,
        sha256=digest,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        orgs=tuple(orgs),
    )


def read_tokens(root: Path) -> list[TokenRecord]:
    """The tokens kept under ``root``. HubError for a damaged file: nobody is let in by accident."""
    path = root / FILE_NAME
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        return [TokenRecord(**{**row, "orgs": tuple(row["orgs"])}) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as err:
        raise HubError(
            f"{path} cannot be read: {err}", "restore it, or delete it and add the tokens again"
        ) from err


def add_token(root: Path, user: str, role: str, orgs: Sequence[str]) -> tuple[str, TokenRecord]:
    """Make a token and keep its digest -> (the token, shown only now; its record). Raises HubError."""
    for name in (user, *orgs):
        if not is_owner(name):
            raise HubError(f"{name!r} is not a name for a user or an organisation", NAME_RULE)
    token = "ah_" + secrets.token_urlsafe(32)
    record = new_record(token, user, role, orgs)
    root.mkdir(parents=True, exist_ok=True)
    _write(root, [*read_tokens(root), record])
    return token, record


def revoke_token(root: Path, token_id: str) -> TokenRecord:
    """Drop the token with this id; a running Hub refuses it from its next request on."""
    records = read_tokens(root)
    for record in records:
        if record.id == token_id:
            _write(root, [other for other in records if other is not record])
            return record
    raise HubError(
        f"{root / FILE_NAME} holds no token with the id {token_id}",
        f"list them: adapterhub hub token list {shlex.quote(str(root))}",
    )


def _write(root: Path, records: list[TokenRecord]) -> None:
    document = {"tokens": [asdict(record) for record in records]}
    replace_file(root / FILE_NAME, json.dumps(document, indent=2).encode() + b"\n", mode=0o600)


class Accounts:
    """Turns tokens into accounts, following changes of the file on disk while the Hub runs."""

    def __init__(self, root: Path, given: TokenRecord | None = None) -> None:
        self._path = root / FILE_NAME
        self._root = root
        self._given = [given] if given else []
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._kept: list[TokenRecord] = []
        # A Hub that started with tokens stays closed when the last one is revoked.
        self.open = not self._given and not self._records()

    def _records(self) -> list[TokenRecord]:
        stamp = None
        with contextlib.suppress(FileNotFoundError):
            stat = self._path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        with self._lock:
            if stamp != self._stamp:
                self._kept = read_tokens(self._root)
                self._stamp = stamp
            return self._given + self._kept

    def identify(self, token: str | None) -> Account | None:
        """The token's account; None without a token on a closed Hub. Refuses an unknown token (401)."""
        if self.open:
            # A token meant for another Hub is harmless here: everybody is the same user anyway.
            return OPEN_ACCOUNT
        if token is None:
            return None
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        for record in self._records():
            if hmac.compare_digest(record.sha256, digest):
                return record.account()
        raise Refusal(401, "Invalid credentials in Authorization header")
