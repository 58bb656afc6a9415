"""The author's own words: kept, put in their places, and never more than words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from adapterhub.cards.authored import check_markdown, to_html
from adapterhub.cards.words import MAX_BYTES, Words, render_words
from adapterhub.errors import ReleaseError
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]
NOTES = """# Why it is there

We made it for a *market stall*. See [our page](https://example.org/orders).

| fruit | price |
|---|---|
| apple | 1 |
"""
OVERRIDES = """{% block about %}
**{{ name }}** answers {{ scores.exact_match.adapter }} of our rows.
{% endblock %}
{% block limits %}
{% if task != "not said" %}Ask it nothing else than: {{ task }}{% endif %}

{% endblock %}
"""


@pytest.mark.slow
def test_words_stand_in_both_renderings_and_stay(rich_release: Path, run_cli: RunCli) -> None:
    (rich_release / "notes.md").write_text(NOTES, encoding="utf-8")
    (rich_release / "card.md.j2").write_text(OVERRIDES, encoding="utf-8")
    assert run_cli("card", rich_release)[0] == 0
    readme = (rich_release / "README.md").read_text(encoding="utf-8")
    page = (rich_release / "card.html").read_text(encoding="utf-8")
    assert "## Notes by its author\n\n### Why it is there\n" in readme
    assert "<h3>Why it is there</h3>" in page
    assert '<a href="https://example.org/orders">our page</a>' in page
    assert "**tiny-orders** answers 98.0 % of our rows." in readme
    assert "<strong>tiny-orders</strong> answers 98.0 % of our rows." in page
    assert "Ask it nothing else than: Turns an order" in readme
    release = Release.open(rich_release)
    release.check_files()  # the author's files are the release's now
    assert {"notes.md", "card.md.j2"} <= release.manifest.files.keys()
    assert run_cli("card", rich_release)[0] == 0
    assert (rich_release / "notes.md").read_text(encoding="utf-8") == NOTES
    assert run_cli("card", rich_release, "--check")[0] == 0

    (rich_release / "notes.md").write_text("Other words.\n", encoding="utf-8")
    code, _, err = run_cli("card", rich_release, "--check")
    assert (code, "README.md does not match" in err) == (3, True)


def test_words_may_be_written_and_changed_before_anything_is_compared_or_measured(
    rich_release: Path, tmp_path: Path, run_cli: RunCli, edit: Callable[..., None]
) -> None:
    earlier = Path(shutil.copytree(rich_release, tmp_path / "earlier"))
    edit(earlier, version="0.0.9")
    for words in ("First words.\n", "Other words.\n"):
        (rich_release / "notes.md").write_text(words, encoding="utf-8")
        code, _, err = run_cli("card", rich_release, "--since", earlier)
        assert code == 0, err
        assert words in (rich_release / "README.md").read_text(encoding="utf-8")
    (rich_release / "notes.md").write_text("Last words.\n", encoding="utf-8")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    code, _, err = run_cli("eval", rich_release, "--data", empty)
    assert (code, "empty.jsonl" in err) == (2, True)  # the release is sound; its rows are what is amiss


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("notes.md", "a\n\n<script>alert(1)</script>\n", "notes.md, line 3: raw HTML is not allowed"),
        ("notes.md", "an <img src=x onerror=alert(1)> here", "raw HTML is not allowed"),
        ("notes.md", "![x](https://evil.example/x.png)", "an image is not allowed"),
        ("notes.md", "[x](javascript:alert(1))", "a link to 'javascript:alert(1)' is not allowed"),
        ("notes.md", "[x][y]\n\n[y]: data:text/html,x", "is not allowed"),
        ("notes.md", "[x](//evil.example)", "a link to '//evil.example' is not allowed"),
        ("notes.md", "```\nnever closed", "a block of code is not closed"),
        ("card.md.j2", "words", "words outside a block belong to no place"),
        ("card.md.j2", "{% block footer %}{% endblock %}", "there is no place footer"),
        ("card.md.j2", "{% block about %}{{ nothing }}{% endblock %}", "'nothing' is undefined"),
        ("card.md.j2", "{% block about %}{{ scores }}{% endblock %}", "name one of them"),
        (
            "card.md.j2",
            "{% block about %}{% for x in name %}a{% endfor %}{% endblock %}",
            "for is not allowed",
        ),
        ("card.md.j2", "{% block about %}{{ name.upper() }}{% endblock %}", "call is not allowed"),
        ("card.md.j2", "{% block about %}{{ name * 9999999 }}{% endblock %}", "mul is not allowed"),
        ("card.md.j2", "{% block about %}{{ name|e }}{% endblock %}", "filter is not allowed"),
        ("card.md.j2", "{% include '/etc/passwd' %}", "belong to no place"),
        ("card.md.j2", "{% block about %}{{ name.__class__ }}{% endblock %}", "card.md.j2"),
        ("card.md.j2", "{% block about %}<b>x</b>{% endblock %}", "block about, line 1: raw HTML"),
        ("card.md.j2", "{% block about %}", "card.md.j2, line 1"),
    ],
)
def test_what_is_more_than_words_is_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    data = text.encode()
    words = Words(data if name == "notes.md" else None, data if name != "notes.md" else None, tmp_path)
    with pytest.raises(ReleaseError) as raised:
        render_words(words, {"name": "a", "scores": {}})
    assert said in raised.value.what


def test_a_fact_that_holds_markup_is_text(tmp_path: Path) -> None:
    words = Words(None, b"{% block about %}It is {{ name }}{% endblock %}", tmp_path)
    text = render_words(words, {"name": "<b>x</b> **y** [z](javascript:a)"})["about"]
    assert "<b>" not in to_html(text)
    assert "<strong>" not in to_html(text)
    assert "href" not in to_html(text)


@pytest.mark.parametrize("data", [b"a" * (MAX_BYTES + 1), b"\xff\xfe\x00"])
def test_what_is_no_text_or_too_long_is_an_error(tiny_release: Path, run_cli: RunCli, data: bytes) -> None:
    (tiny_release / "notes.md").write_bytes(data)
    code, _, err = run_cli("card", tiny_release)
    assert (code, "notes.md" in err) == (3, True)
    assert not (tiny_release / "README.md").exists()


@given(st.text(alphabet="#-=*_[]()<>!`~|\\:/ \n\tab1.&;\u202e\x00", max_size=60))
def test_whatever_passes_ends_where_it_ends_and_holds_no_markup(text: str) -> None:
    try:
        safe = check_markdown(text, "notes.md", 3)
    except ReleaseError:
        return
    tokens = MarkdownIt("commonmark").enable("table").parse(f"before\n\n{safe}\n\n# after\n")
    types = [token.type for token in [*tokens, *(c for t in tokens for c in t.children or [])]]
    assert not {"html_block", "html_inline", "image"} & set(types)
    assert [token.content for token in tokens][-2] == "after"
    assert all(int(t.tag[1]) >= 3 for t in tokens[:-3] if t.type == "heading_open" and t.level == 0)
    assert "\u202e" not in safe
    html = to_html(safe)
    assert "<script" not in html
    assert "<img" not in html
