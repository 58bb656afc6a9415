"""Any repository on a Hub brought here to be looked at: nothing in it is opened, trusted or left out."""

from __future__ import annotations

import os
from pathlib import Path

from adapterhub.hub.client import connect, hub_errors, resolve
from adapterhub.hub.pull import newest
from adapterhub.hub.refs import parse_ref


def fetch_all(source: str, *, endpoint: str | None = None, token: str | None = None) -> Path:
    """Bring every file of a repository here, a release or not; return the folder.

    ``source`` is ``owner/name[@revision]``, without a revision what ``pull`` would take. The files lie in a
    cache of their own (``$XDG_CACHE_HOME/adapterhub/scans``): no loader finds them there. Raises RefError,
    AuthError, HubError, and OSError when the disk is full.
    """
    api, asked = connect(endpoint, token), parse_ref(source)
    ref = newest(api, asked)
    commit = resolve(api, ref).commit
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapterhub" / "scans"
    with hub_errors(api, ref):
        return Path(api.snapshot_download(ref.repo, revision=commit, cache_dir=cache))
