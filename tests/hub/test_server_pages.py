"""The Hub's pages: card and files of a repository, and nothing of a stranger's that a browser obeys."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Callable
from uuid import uuid4

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

HOSTILE = """---
license: apache-2.0
---
# Orders <script>alert(1)</script>

<img src=x onerror=alert(2)> [press](javascript:alert(3)) [scores](evidence/scores.json) ![a](https://evil/p.png)

| a | b |
|---|---|
| 1 | 2 |
"""


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi(endpoint=hub_server.url, token=hub_server.token)


@pytest.fixture
def repo(api: HfApi) -> str:
    repo = f"ada/page-{uuid4().hex[:8]}"
    api.create_repo(repo)
    files = {"README.md": HOSTILE.encode(), "evidence/scores.json": b"{}", "a <b>&.txt": b"x"}
    api.create_commit(
        repo,
        [CommitOperationAdd(name, data) for name, data in files.items()],
        commit_message="first",
    )
    api.create_tag(repo, tag="v1.0.0")
    return repo


@pytest.fixture
def page(hub_server) -> Callable[[str], tuple[int, str, dict[str, str]]]:
    def get(path: str) -> tuple[int, str, dict[str, str]]:
        try:
            with urllib.request.urlopen(hub_server.url + path) as answer:
                return answer.status, answer.read().decode(), dict(answer.headers)
        except urllib.error.HTTPError as err:
            return err.code, err.read().decode(), dict(err.headers)

    return get


def test_a_page_shows_the_card_and_files_and_runs_nothing(page, api, repo) -> None:
    commit = api.model_info(repo).sha
    status, text, headers = page(f"/{repo}")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.search(r"<(script|img|iframe|form)|href=.javascript", text)
    assert "license: apache-2.0" not in text
    assert "<td>1</td>" in text
    assert f'href="/{repo}/resolve/{commit}/evidence/scores.json"' in text
    assert "a &lt;b&gt;&amp;.txt" in text
    for address in (f"/{repo}/tree/v1.0.0", f"/{repo}/commit/{commit}"):
        assert page(address)[0] == 200
    target = re.search(r'href="([^"]+a%20[^"]+)"', text)
    assert target is not None
    assert page(target[1])[:2] == (200, "x")
    assert f'href="/{repo}"' in page("/")[1]


def test_strangers_see_no_private_page(page, api, repo) -> None:
    api.update_repo_settings(repo, visibility="private")
    assert page(f"/{repo}")[0] == page("/ada/never-made")[0] == 401
    assert repo not in page("/")[1]
    assert page(f"/{repo}/tree/v9")[0] == 401


def test_a_pull_request_shows_its_changes(page, api, repo) -> None:
    api.upload_file(
        repo_id=repo,
        path_or_fileobj=b"<b>new</b>\n",
        path_in_repo="new.txt",
        create_pr=True,
        commit_message="Add <i>this</i>",
    )
    status, text, _ = page(f"/{repo}/discussions/1")
    assert status == 200
    assert "Add &lt;i&gt;this&lt;/i&gt;" in text
    assert "+&lt;b&gt;new&lt;/b&gt;" in text
    assert page(f"/{repo}/discussions/7")[0] == 404
