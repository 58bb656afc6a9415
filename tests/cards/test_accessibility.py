"""Cards, galleries and the page for people's verdicts, held to axe-core in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
from browser import Browser

from adapterhub.cards.ballot import Ballot, build_ballot_app
from adapterhub.cards.contest import AnswerRow, Contest, read_tasks
from adapterhub.cards.judgments import System
from adapterhub.packaging.base import base_digest
from adapterhub.packaging.evidence import (
    FIDELITY,
    FidelityEvidence,
    FidelityFigures,
    LayerError,
    to_json,
)
from adapterhub.packaging.manifest import Hardware
from adapterhub.packaging.release import Release

pytestmark = pytest.mark.slow
FIND = """
axe.run(document, {resultTypes: ["violations"]}).then((found) => ({
  told: found.violations.map((it) => ({id: it.id, nodes: it.nodes.map((node) => node.html)})),
  passed: found.passes.length,
  tooWide: document.documentElement.scrollWidth - innerWidth,
}))
"""


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's source; the tests skip where it is missing."""
    pytest.importorskip("axe_core_python")
    return (resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def violations(browser: Browser, axe: str, tmp_path: Path) -> Callable[..., list[dict]]:
    """``violations(html, dark=True, width=360)`` -> what axe-core finds, and a page that is too wide."""

    def find(html: str, *, dark: bool, width: int) -> list[dict]:
        path = tmp_path / "page.html"
        path.write_text(html, encoding="utf-8")
        browser.show(path.as_uri(), width=width, dark=dark)
        browser.run(f"{axe}; 0")
        found = browser.run(FIND)
        assert found["passed"] > 5
        wide = [{"id": "wider than the screen", "nodes": [found["tooWide"]]}] if found["tooWide"] > 0 else []
        return [*found["told"], *wide]

    return find


@pytest.mark.parametrize(("dark", "width"), [(False, 1000), (True, 1000), (False, 360)])
def test_card_gallery_and_ballot_have_no_violations(
    rich_release: Path,
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    violations: Callable[..., list[dict]],
    dark: bool,
    width: int,
) -> None:
    (rich_release / "notes.md").write_text(
        2 * "## Notes\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\ncode\n```\n\n"
    )
    add_fidelity(rich_release)
    shutil.copytree(rich_release, tmp_path / "shelf" / "orders")
    (tmp_path / "shelf" / "broken").mkdir()
    (tmp_path / "shelf" / "broken" / "adapterhub.json").write_text("{")
    site = tmp_path / "site"
    assert run_cli("site", tmp_path / "shelf", "--out", site)[0] == 0
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert len(pages) == 4
    pages["ballot"] = ballot_page(tmp_path)
    found = {name: violations(html, dark=dark, width=width) for name, html in pages.items()}
    assert not {name: told for name, told in found.items() if told}


def add_fidelity(folder: Path) -> None:
    release = Release.open(folder)
    weights = "adapter_model.safetensors"
    fidelity = FidelityEvidence(
        reference="tiny-orders@0.1.0", reference_sha256=None, text="test.jsonl",
        text_sha256="f" * 64, texts=60, seconds=2.0,
        weights_digest=base_digest({weights: release.manifest.files[weights].sha256}),
        hardware=Hardware(device="cpu", name="AMD EPYC 7R13", memory_bytes=8 * 2**30, count=2),
        figures=FidelityFigures(
            tokens=4321, kl_mean=0.00123, kl_p99=0.0456, top1_agreement=0.991, reference_nll=0.1,
            candidate_nll=0.1, reference_perplexity=1.1052, candidate_perplexity=1.1061,
            layers=(LayerError(name="model.layers.0", relative_error=0.002),),
        ),
    )  # fmt: skip
    release.with_files({FIDELITY: to_json(fidelity)})


def ballot_page(folder: Path) -> str:
    """The page on which people judge, as it is served."""
    from asyncio import run

    questions = folder / "questions.jsonl"
    questions.write_text('{"question_id": 1, "text": "Why?"}\n')
    tasks, source = read_tasks(questions)
    contest = Contest.open(folder / "arena", tasks, source)
    for name in ("one", "two"):
        contest.enter(System(name=name, kind="answers", sha256="0" * 64))
        contest.add_answers(name, [AnswerRow(question="1", text=name)])
    app = build_ballot_app(Ballot(contest, "one", "two", "ann"), lambda: None)
    sent: list[bytes] = []

    async def ask() -> None:
        async def receive() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message.get("body", b""))

        scope = {
            "type": "http", "http_version": "1.1", "asgi": {"version": "3.0"}, "scheme": "http",
            "root_path": "", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"",
            "headers": [(b"host", b"127.0.0.1")],
        }  # fmt: skip
        await app(scope, receive, send)

    run(ask())
    return b"".join(sent).decode()
