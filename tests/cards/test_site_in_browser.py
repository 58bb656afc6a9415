"""The gallery's scripts, in a real browser: search, sort and compare, under the pages' own policy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import Browser

from adapterhub.packaging.evidence import FAILURES, SCORES, ScoresEvidence, to_json
from adapterhub.packaging.manifest import Manifest
from adapterhub.packaging.release import Release

pytestmark = pytest.mark.slow
NAMES = """[...document.querySelectorAll(".releases tbody tr")]
  .filter((row) => row.checkVisibility()).map((row) => row.cells[0].querySelector("a").textContent)"""
LINES = """Object.fromEntries([...document.getElementById("comparison").tBodies[0].rows].map((row) =>
  [row.cells[0].textContent, [row.cells[1].textContent, row.cells[2].textContent]]))"""
RIGHT = {"apples": 0.5, "berries": 1.0, "cherries": 0.05}


@pytest.fixture
def site(
    rich_release: Path,
    tmp_path: Path,
    edit: Callable[..., None],
    run_cli: Callable[..., tuple[int, str, str]],
) -> Path:
    """Three measured releases, one of them in two versions, and one that nobody measured."""
    shelf = tmp_path / "shelf"
    for name, share in RIGHT.items():
        copy(rich_release, shelf / name, edit, share, failures=round(100 * share), task=f"Counts {name}.")
    edit(shelf / "cherries", base=renamed(rich_release, "another/base"))
    copy(rich_release, shelf / "older", edit, 0.25, failures=3, name="apples", version="0.0.9")
    unmeasured = Path(shutil.copytree(rich_release, shelf / "dates"))
    kept = {name: entry for name, entry in Manifest.read(unmeasured).files.items() if "evidence" not in name}
    shutil.rmtree(unmeasured / "evidence")
    edit(unmeasured, name="dates", task=None, files=kept)
    code, _, err = run_cli("site", shelf, "--out", tmp_path / "site")
    assert code == 0, err
    return tmp_path / "site"


def copy(
    rich: Path, folder: Path, edit: Callable[..., None], share: float, *, failures: int, **changes: object
) -> None:
    """A release like ``rich`` with another score and so many failure cases."""
    shutil.copytree(rich, folder)
    edit(folder, **({"name": folder.name} | changes))
    scores = ScoresEvidence.model_validate_json((folder / SCORES).read_bytes())
    exact = scores.scores[0].model_copy(update={"adapter": share})
    lines = (folder / FAILURES).read_bytes().splitlines(keepends=True)[:1] * failures
    Release.open(folder).with_files(
        {
            SCORES: to_json(scores.model_copy(update={"scores": (exact, *scores.scores[1:])})),
            FAILURES: b"".join(lines),
        }
    )


def renamed(folder: Path, name: str) -> object:
    base = Manifest.read(folder).base
    assert base is not None
    return base.model_copy(update={"name": name})


def click(browser: Browser, column: str) -> Sequence[str]:
    """Sort by a column, with the keyboard; the names in their order then."""
    buttons = "[...document.querySelectorAll('.releases th button')]"
    browser.run(f"{buttons}.find((it) => it.textContent === '{column}').focus()")
    browser.press_enter()
    return browser.run(NAMES)


def test_words_that_are_typed_leave_the_releases_that_have_them_all(site: Path, browser: Browser) -> None:
    browser.show((site / "index.html").as_uri())
    assert browser.run(NAMES) == ["apples", "berries", "cherries", "dates"]
    browser.run("document.getElementById('words').focus()")
    for typed, left in (
        ("COUNTS", ["apples", "berries", "cherries"]),
        (" another", ["cherries"]),
        (" apples", []),
    ):
        browser.type(typed)
        assert browser.run(NAMES) == left
        told = browser.run("document.getElementById('shown').textContent")
        assert told == f"{len(left)} of 4 shown"
    browser.press_enter()  # sends nothing anywhere
    assert browser.run("location.href").endswith("/index.html")
    browser.run("document.getElementById('words').select()")
    browser.type(" ")
    assert len(browser.run(NAMES)) == 4


def test_every_column_sorts_both_ways_and_what_was_not_measured_comes_last(
    site: Path, browser: Browser
) -> None:
    browser.show((site / "index.html").as_uri())
    assert click(browser, "release") == ["dates", "cherries", "berries", "apples"]  # it was sorted already
    assert click(browser, "release") == ["apples", "berries", "cherries", "dates"]
    assert click(browser, "exact match") == ["cherries", "apples", "berries", "dates"]
    assert click(browser, "exact match") == ["berries", "apples", "cherries", "dates"]
    assert click(browser, "failure cases") == [
        "cherries",
        "apples",
        "berries",
        "dates",
    ]  # 5, 50, 100: numbers
    assert click(browser, "failure cases") == ["berries", "apples", "cherries", "dates"]
    assert click(browser, "task") == ["apples", "berries", "cherries", "dates"]
    assert click(browser, "base")[0] == "cherries"
    told = browser.run(
        "[...document.querySelectorAll('.releases th[aria-sort]')].map((it) => [it.textContent, it.ariaSort])"
    )
    assert told == [["base", "ascending"]]


def test_two_versions_stand_side_by_side_and_the_address_names_them(site: Path, browser: Browser) -> None:
    page = (site / "compare.html").as_uri()
    browser.show(f"{page}#{quote('apples@0.1.0')}&{quote('dates@0.1.0')}")
    lines = browser.run(LINES)
    assert lines["task"] == ["Counts apples.", "not said"]
    assert lines["known failure cases"] == ["50", "not measured"]
    assert lines["failure cases: wrong_answer"] == ["50", "not measured"]
    (exact,) = (values for name, values in lines.items() if name.startswith("exact match, 198 rows"))
    assert exact[0].startswith("50.0 % (")
    assert exact[1] == "not measured"
    browser.run(
        """(() => { const b = document.getElementById("b"); b.value = "apples@0.0.9";
        b.dispatchEvent(new Event("change")); })()"""
    )
    lines = browser.run(LINES)
    assert lines["known failure cases"] == ["50", "3"]
    differ = "[...document.querySelectorAll('#comparison .differs th')].map((it) => it.textContent)"
    assert "known failure cases" in browser.run(differ)
    assert "base" not in browser.run(differ)
    address = browser.run("location.href")
    browser.show(address)
    assert browser.run(LINES) == lines
    heads = browser.run(
        "[document.getElementById('head-a').textContent, document.getElementById('head-b').textContent]"
    )
    assert heads == ["apples@0.1.0", "apples@0.0.9"]


def test_a_link_from_a_releases_page_compares_its_two_newest_versions(site: Path, browser: Browser) -> None:
    browser.show((site / "releases" / "apples" / "index.html").as_uri())
    browser.show(browser.run("[...document.links].find((it) => it.textContent.startsWith('Compare')).href"))
    assert browser.run("document.getElementById('head-b').textContent") == "apples@0.0.9"
    assert browser.run("document.getElementById('told').textContent") == ""


def test_an_address_that_names_nothing_shows_something_all_the_same(site: Path, browser: Browser) -> None:
    browser.show(f"{(site / 'compare.html').as_uri()}#%E0%A4%A&nobody@9.9.9")
    chosen = browser.run("['a', 'b'].map((it) => document.getElementById(it).value)")
    assert chosen == ["apples@0.1.0", "apples@0.0.9"]
