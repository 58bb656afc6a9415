"""What a command line names: a folder here, or owner/name[@version] on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.errors import HubError, RefError, ReleaseError
from adapterhub.packaging.files import cached_ref

if TYPE_CHECKING:
    from adapterhub.packaging.release import Release


base_mismatch_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--allow-base-mismatch",
    metavar="REASON",
    help="Take a base that differs from the one trained on, and record why it will do.",
)
"""The option of every command that loads a base: see ``packaging.base.check_base``."""


def refuse_cached(folder: Path) -> None:
    """Raise ReleaseError for a folder of the Hugging Face cache: what is written there passes for the Hub's.

    Every command that writes into a release calls it before its work.
    """
    ref = cached_ref(folder)
    if ref is not None:
        raise ReleaseError(
            f"{folder} lies in the Hugging Face cache, which must stay as the Hub holds it",
            f"work on a copy of your own: adapterhub pull {ref} --out DIR",
        )


def find_folder(target: str, endpoint: str | None) -> Path:
    """The folder of a release or an adapter; what is no folder here is pulled from the Hub.

    Whether it is sound is for the command to say. Raises ReleaseError for a path where no folder is, HubError
    and its kinds as a pull does.
    """
    if Path(target).is_dir():
        return Path(target)
    from adapterhub.load import open_release

    with naming_folder_or_ref(target):
        return open_release(target, endpoint=endpoint).path


def locate_base(
    base: str | None, adapter: Path, endpoint: str | None, allow_mismatch: str | None = None
) -> Path:
    """The folder of the base that ``base`` names, or else the release in ``adapter``.

    A folder here is for the command to check; what a Hub has is held against the release's lock, unless
    ``allow_mismatch`` says why another base will do. Raises
    ReleaseError when nothing names a base, and what ``load.find_base`` raises.
    """
    from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest

    if base is not None and Path(base).is_dir():
        return Path(base)
    lock = Manifest.read(adapter).base if (adapter / MANIFEST_NAME).is_file() else None
    if base is None and lock is None:
        raise ReleaseError(f"{adapter} does not bind a base", "name it with --base")
    from adapterhub.load import find_base

    with naming_folder_or_ref(base) if base is not None else nullcontext():
        return find_base(lock, base, endpoint=endpoint, allow_mismatch=allow_mismatch)


def open_checked(target: str, endpoint: str | None) -> Release:
    """The release that ``target`` names, every file and a signature checked; see ``load.open_release``.

    Raises ReleaseError for a path where no folder is, SignatureError, HubError and its kinds.
    """
    from adapterhub.load import open_release

    if Path(target).is_dir():
        return open_release(target)
    with naming_folder_or_ref(target):
        return open_release(target, endpoint=endpoint)


@contextmanager
def naming_folder_or_ref(target: str) -> Iterator[None]:
    """Around asking a Hub for ``target``, which is no folder here: what can only be a path is not asked for.

    Raises ReleaseError for such a path; a RefError from inside says that there is no such folder either.
    """
    from adapterhub.hub.refs import looks_like_path

    if looks_like_path(target) or Path(target).is_file():
        kind = "is a file, not a folder" if Path(target).exists() else "no such folder"
        raise ReleaseError(f"{target}: {kind}", "check the path, or name owner/name[@version] on the Hub")
    try:
        yield
    except RefError as err:
        raise RefError(f"{err.what}; and there is no folder {target} here", err.fix) from err


@contextmanager
def naming_kind(target: str, kind: str | None, endpoint: str | None) -> Iterator[None]:
    """Around asking a Hub for ``target``: a RefError from inside says so when the Hub has a dataset of that
    name and no model, and ``kind`` is not ``dataset``."""
    try:
        yield
    except RefError as err:
        if kind != "dataset" and _is_dataset(target, endpoint):
            raise RefError(f"{target} is a dataset", "add --type dataset") from err
        raise


def _is_dataset(target: str, endpoint: str | None) -> bool:
    """Whether a Hub has a dataset of that name, and no model; False too when it cannot be asked."""
    from adapterhub.hub.client import connect, look_up
    from adapterhub.hub.refs import parse_ref

    try:
        api, ref = connect(endpoint), parse_ref(target)
        return look_up(api, ref) is None and look_up(api, ref, "dataset") is not None
    except HubError:
        return False
