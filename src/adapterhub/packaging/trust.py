"""The trust policy: whom a publisher's releases must be signed by, as the user and the project say.

Two files say it, both TOML: the user's ``$XDG_CONFIG_HOME/adapterhub/trust.toml`` and the project's
``adapterhub-trust.toml``. Each entry names one key, certificate authority or Sigstore identity. With a
``publisher`` it is a rule: what that publisher released must be signed so. Without, it is accepted wherever
no rule speaks, and so are the keys in the user's folder of trusted keys.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from adapterhub.errors import SignatureError
from adapterhub.packaging.anchors import (
    Anchor,
    TrustedAuthority,
    TrustedIdentity,
    TrustedKey,
    authority_digest,
)
from adapterhub.packaging.files import cached_ref
from adapterhub.packaging.keys import (
    config_folder,
    parse_public_key,
    public_pem,
    read_public_key,
    trusted_keys,
)
from adapterhub.packaging.problems import first_problem

USER_NAME = "trust.toml"
PROJECT_NAME = "adapterhub-trust.toml"
_MAX_BYTES = 1024 * 1024
_PATTERN = re.compile(r"\*|[A-Za-z0-9_.*?-]{1,96}/[A-Za-z0-9_.*?-]{1,96}")

Role = Literal["maker", "reviewer"]


def _check_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(f"{pattern!r} is no publisher: write owner/*, owner/name or * for everything")
    return pattern


class Entry(BaseModel):
    """One ``[[trust]]`` of a trust file: exactly one of ``key``, ``certificate`` and ``identity``."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    publisher: Annotated[str, AfterValidator(_check_pattern)] | None = None
    """``owner/*``, ``owner/name`` (``*`` and ``?`` stand for any characters), or ``*`` for everything,
    folders on this machine too. Letters' case does not matter. Of several that match, the most literal one
    counts."""
    role: Role = "maker"
    """One of a publisher's makers must have signed; and one of its reviewers too, if it has any."""
    key: str | None = None
    """A PEM public key."""
    certificate: str | None = None
    """PEM certificates of the authority that issued the signer's."""
    subject: str | None = None
    """For a certificate: what the signer's must be issued to."""
    identity: str | None = None
    """A Sigstore identity: an e-mail address or a workflow's URI."""
    issuer: str | None = None
    """For an identity: the URL of the OpenID Connect issuer that vouched for it."""

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if sum(it is not None for it in (self.key, self.certificate, self.identity)) != 1:
            raise ValueError("must have exactly one of key, certificate and identity")
        if (self.identity is None) != (self.issuer is None):
            raise ValueError("identity and issuer belong together")
        if self.subject is not None and self.certificate is None:
            raise ValueError("subject belongs to a certificate")
        if self.role == "reviewer" and self.publisher is None:
            raise ValueError("a reviewer needs a publisher")
        if self.key is not None:
            parse_public_key(self.key.encode(), "key")
        if self.certificate is not None:
            authority_digest(self.certificate.encode(), "certificate")
        return self

    @property
    def fingerprint(self) -> str | None:
        """sha256 of the key's PEM form, or of the first certificate's DER form; None for an identity."""
        if self.key is not None:
            return sha256(public_pem(parse_public_key(self.key.encode(), "key"))).hexdigest()
        if self.certificate is not None:
            return authority_digest(self.certificate.encode(), "certificate")
        return None

    @property
    def words(self) -> str:
        """Whom it names, for people."""
        if self.key is not None:
            return f"key {self.fingerprint}"
        if self.certificate is not None:
            issued = f" to {self.subject}" if self.subject else ""
            return f"certificate issued{issued} by {self.fingerprint}"
        return f"identity {self.identity} by {self.issuer}"

    def anchor(self, source: Path) -> Anchor:
        """What a signature is checked against; ``source`` is the file that this stands in."""
        if self.key is not None:
            return TrustedKey(public_pem(parse_public_key(self.key.encode(), str(source))), source)
        if self.certificate is not None:
            return TrustedAuthority(self.certificate.encode(), self.subject, source)
        assert self.identity is not None
        assert self.issuer is not None
        return TrustedIdentity(self.identity, self.issuer, source)


class TrustFile(BaseModel):
    """The content of a trust file."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    schema_version: Literal[1] = 1
    trust: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Rule:
    """What one file asks of a publisher."""

    source: Path
    pattern: str
    makers: tuple[Anchor, ...]
    reviewers: tuple[Anchor, ...]


@dataclass(frozen=True)
class Policy:
    """The trust files that count here, read."""

    files: tuple[tuple[Path, TrustFile], ...]

    @classmethod
    def read(cls) -> Policy:
        """The user's file and the project's, as far as they are there.

        The project's is the nearest ``adapterhub-trust.toml`` in the working folder or above it, up to the
        folder that holds ``.git``. Raises SignatureError for a file that is malformed, that others may
        write, or that belongs to another user.
        """
        paths = (user_file(), find_project_file())
        return cls(
            tuple((path, read_trust_file(path)) for path in paths if path is not None and path.exists())
        )

    def rules(self, publisher: str | None) -> tuple[Rule, ...]:
        """What is asked of ``publisher`` (``owner/name``; None for a folder of no known origin).

        At most one rule a file: each file's must be met, so that a project can only ask for more.
        """
        found = (self._rule(path, content, publisher) for path, content in self.files)
        return tuple(rule for rule in found if rule is not None)

    def accepted(self) -> tuple[Anchor, ...]:
        """Whose signature counts where no rule speaks: the trusted keys' folder, entries of no publisher."""
        keys: list[Anchor] = [key_anchor(path) for path in trusted_keys()]
        entries = ((path, entry) for path, content in self.files for entry in content.trust)
        return (*keys, *(entry.anchor(path) for path, entry in entries if entry.publisher is None))

    @staticmethod
    def _rule(path: Path, content: TrustFile, publisher: str | None) -> Rule | None:
        patterns = {it.publisher for it in content.trust if it.publisher is not None}
        matching = [pattern for pattern in patterns if _matches(pattern, publisher)]
        if not matching:
            return None
        chosen = max(matching, key=lambda it: (len(it) - it.count("*") - it.count("?"), it))
        sides: dict[Role, tuple[Anchor, ...]] = {
            role: tuple(it.anchor(path) for it in content.trust if it.publisher == chosen and it.role == role)
            for role in ("maker", "reviewer")
        }
        return Rule(path, chosen, sides["maker"], sides["reviewer"])


def user_file() -> Path:
    """Where the user's trust file lies, if there is one."""
    return config_folder() / USER_NAME


def find_project_file(start: Path | None = None) -> Path | None:
    """The nearest project trust file at or above ``start`` (the working folder), within the repository."""
    here = (start or Path.cwd()).absolute()
    for folder in (here, *here.parents):
        if (folder / PROJECT_NAME).is_file():
            return folder / PROJECT_NAME
        if (folder / ".git").exists() or folder == Path.home():
            return None
    return None


def read_trust_file(path: Path) -> TrustFile:
    """Read a trust file. Raises SignatureError for one that is malformed, or that others could write."""
    fix = f"mend {path}, or remove it and add what you trust with `adapterhub trust add`"
    with path.open("rb") as file:
        _check_owner(path, os.fstat(file.fileno()))
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"over {_MAX_BYTES} bytes")
        return TrustFile.model_validate(tomllib.loads(data.decode("utf-8")))
    except ValidationError as err:
        place, words = first_problem(err)
        raise SignatureError(f"{path}: {place}: {words}", fix) from err
    except (ValueError, RecursionError) as err:
        raise SignatureError(f"{path} is not valid TOML: {err}", fix) from err
    except SignatureError as err:
        raise SignatureError(f"{path}: {err.what}", fix) from err


def key_anchor(path: Path) -> TrustedKey:
    """A public key file as what a signature is held to. Raises SignatureError when it holds none."""
    return TrustedKey(public_pem(read_public_key(path)), path)


def publisher_of(folder: Path) -> str | None:
    """``owner/name`` for a folder of the Hugging Face cache, whose path tells it; None for any other."""
    ref = cached_ref(folder)
    return ref.partition("@")[0] if ref is not None else None


def accepted_by(anchors: Sequence[Anchor]) -> str:
    """``anchors`` in words: two of them by name."""
    return ", ".join(_named(anchors)) + (f" and {len(anchors) - 2} more" if len(anchors) > 2 else "")


def _named(anchors: Sequence[Anchor]) -> Iterator[str]:
    for anchor in anchors[:2]:
        if isinstance(anchor, TrustedKey):
            yield f"key {anchor.fingerprint[:16]}…"
        elif isinstance(anchor, TrustedIdentity):
            yield f"identity {anchor.identity}"
        else:
            yield f"certificate authority {authority_digest(anchor.pem, str(anchor.source))[:16]}…"


def _matches(pattern: str, publisher: str | None) -> bool:
    if pattern == "*":
        return True
    if publisher is None:
        return False
    sides = zip(publisher.casefold().split("/"), pattern.casefold().split("/"), strict=True)
    return all(fnmatchcase(part, glob) for part, glob in sides)


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Refuse a trust file that somebody else could have written."""
    if status.st_mode & stat.S_IWOTH:
        raise SignatureError(
            f"{path} decides what is trusted, and everybody may write it", f"chmod o-w {path}"
        )
    if os.geteuid() != 0 and status.st_uid not in (0, os.geteuid()):
        raise SignatureError(
            f"{path} decides what is trusted, and belongs to another user",
            f"read it, and make it yours if you agree: chown {os.geteuid()} {path}",
        )
