"""What a command line names: a folder here, or owner/name[@version] on the Hub."""

from __future__ import annotations

from pathlib import Path


def find_folder(target: str, endpoint: str | None) -> Path:
    """The folder of a release or an adapter; what is no folder here is pulled from the Hub.

    Whether it is sound is for the command to say. Raises HubError and its kinds as a pull does.
    """
    if Path(target).is_dir():
        return Path(target)
    from adapterhub.load import open_release

    return open_release(target, endpoint=endpoint).path
