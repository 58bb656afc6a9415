"""Every error adapterhub raises on purpose, as one tree.

::

    AdapterHubError            1   what happened, on which file or key, and what to do
    ├─ RecipeError             2   a recipe, an option or training data that cannot be used
    │  └─ DataError            2   a row or a file of training or evaluation data
    ├─ ReleaseError            3   a release folder that cannot be used
    │  ├─ ManifestError        3   adapterhub.json is missing, malformed or breaks its schema
    │  ├─ VersionError         3   not a semantic version, or one that would move, be reused or go back
    │  ├─ LockError            3   adapterhub.lock is missing, malformed, or does not hold what is asked for
    │  └─ BaseMismatchError    3   the base model is not the one the adapter was trained on
    ├─ SignatureError          4   tampered with, unsigned where a signature is required, or not trusted
    ├─ HubError                5   the Hub refused, failed or could not be reached
    │  ├─ RefError             5   no such repository, revision or version
    │  ├─ AuthError            5   the token is missing, wrong or may not do this
    │  └─ ConflictError        5   somebody else moved the branch or took the version
    └─ TrainingError           6   NaN loss, out of memory, a checkpoint that cannot be resumed

The number is the exit code of the command line. ``cli.main`` prints the two parts as ``error: …`` and
``fix: …``; library users read them as ``err.what`` and ``err.fix``.
"""

from __future__ import annotations


class AdapterHubError(Exception):
    """Something went wrong that its user can act on.

    ``what`` says what happened and on which file or key, ``fix`` what to do about it; both are one line.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what} (fix: {self.fix})"

    def __reduce__(self) -> tuple[type[AdapterHubError], tuple[str, str]]:
        return type(self), (self.what, self.fix)


class AdapterHubWarning(UserWarning):
    """Something that its user should know and that stops nothing; the command line prints it on stderr."""


class RecipeError(AdapterHubError):
    """A recipe, an option or training data cannot be used."""

    exit_code = 2


class DataError(RecipeError):
    """A row or a file of training or evaluation data cannot be used."""


class ReleaseError(AdapterHubError):
    """A release folder cannot be used."""

    exit_code = 3


class ManifestError(ReleaseError):
    """adapterhub.json is missing, malformed or breaks its schema."""


class VersionError(ReleaseError):
    """Not a semantic version, or one that would be moved or reused, or go back."""


class LockError(ReleaseError):
    """adapterhub.lock is missing, malformed, or does not hold what is asked for."""


class BaseMismatchError(ReleaseError):
    """The base model is not the one the adapter was trained on."""


class SignatureError(AdapterHubError):
    """Tampered with, unsigned where a signature is required, or signed by a key that is not trusted."""

    exit_code = 4


class HubError(AdapterHubError):
    """The Hub refused, failed or could not be reached."""

    exit_code = 5


class RefError(HubError):
    """No such repository, revision or version."""


class AuthError(HubError):
    """The token is missing, wrong or may not do this."""


class ConflictError(HubError):
    """Somebody else moved the branch or took the version."""


class TrainingError(AdapterHubError):
    """NaN loss, out of memory, or a checkpoint that cannot be resumed."""

    exit_code = 6
