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


def publish(rows: str, repo: str, endpoint: str, token: str, cache: str) -> None:
    """The rows in a file, signed with the key beside it."""
    from huggingface_hub import constants

    from adapterhub.cards.dataset import render_dataset_card
    from adapterhub.hub.publishing import Wish, publish_rows

    constants.HF_HUB_CACHE = cache
    wish = Wish(licence="mit", test_share=0.25, key=Path(rows).with_name("adapterhub.key"))
    publish_rows(Path(rows), repo, wish, render_dataset_card, endpoint=endpoint, token=token)
