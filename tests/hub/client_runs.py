"""What a process of its own does to a Hub, so that a test can kill it."""

from __future__ import annotations

import time
from pathlib import Path


def push_release(folder: str, repo: str, endpoint: str, token: str) -> None:
    from adapterhub.hub.push import push
    from adapterhub.packaging.release import Release

    push(Release.open(Path(folder)), repo, endpoint=endpoint, token=token)


def pull_release(repo: str, endpoint: str, token: str, repo_type: str, cache: str) -> None:
    from huggingface_hub import constants

    from adapterhub.hub import downloads
    from adapterhub.hub.pull import pull

    constants.HF_HUB_CACHE = cache
    downloads._PAUSE = 0.001
    real = time.sleep
    time.sleep = lambda seconds: real(min(seconds, 0.002))
    pull(repo, endpoint=endpoint, token=token, repo_type=repo_type)  # type: ignore[arg-type]
