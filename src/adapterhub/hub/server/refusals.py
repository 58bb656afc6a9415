"""What the Hub answers when it will not do what was asked: a status, a code, and a sentence."""

from __future__ import annotations

from starlette.responses import JSONResponse


class Refusal(Exception):
    """A request that is answered with an error.

    ``status`` is the HTTP status, ``message`` one line for the user, ``code`` the ``X-Error-Code`` that
    huggingface_hub maps to an exception class (RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo), and
    ``headers`` further response headers.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}

    def response(self) -> JSONResponse:
        # A header is one line of printable ASCII; the body carries the text as it is.
        line = "".join(
            it if it.isascii() and it.isprintable() else "?" for it in " ".join(self.message.split())
        )
        headers = {**self.headers, "X-Error-Message": line}
        if self.code:
            headers["X-Error-Code"] = self.code
        return JSONResponse({"error": self.message}, status_code=self.status, headers=headers)


def bad_request(message: str) -> Refusal:
    return Refusal(400, message, "BadRequest")


def conflict(message: str) -> Refusal:
    return Refusal(409, message, "Conflict")


def too_large(message: str) -> Refusal:
    return Refusal(413, message, "TooLarge")


def forbidden(message: str) -> Refusal:
    return Refusal(403, message, "Forbidden")


def repo_not_found(name: str, *, signed_in: bool) -> Refusal:
    """The same answer for a repository that does not exist and for one this caller may not know of."""
    hint = "" if signed_in else "; if it is private, send a token that may read it"
    return Refusal(404 if signed_in else 401, f"Repository {name} not found{hint}", "RepoNotFound")


def revision_not_found(revision: str) -> Refusal:
    return Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str) -> Refusal:
    return Refusal(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit})
