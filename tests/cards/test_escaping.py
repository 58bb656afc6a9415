"""Whatever a release holds stays text: checked with a CommonMark parser."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from adapterhub.cards.escaping import block, code, inline, one_line, visible

MARKDOWN = MarkdownIt("commonmark").enable("table").enable("strikethrough")
ACTIVE = st.text(alphabet="|`*_[]()<>&\\!#~$-+=:1. \n\t\r\x00ab\u202e\u2028", max_size=40)
TEXTS = st.one_of(ACTIVE, st.text(max_size=60))


def cells(markdown: str) -> list[list]:
    """The inline tokens of each cell in the body of a two-column table whose first cell is ``markdown``."""
    tokens = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {markdown} | end |\n")
    body = [token.type for token in tokens].index("tbody_open")
    return [token.children or [] for token in tokens[body:] if token.type == "inline"]


@given(TEXTS)
@example("a | b \\| c")
@example("<script>alert(1)</script> &lt; &amp;")
@example("![x](https://example.org/x.png) [y](javascript:alert(1)) <https://example.org>")
def test_inline_text_is_one_cell_of_plain_text(text: str) -> None:
    first, last = cells(inline(text))
    assert {token.type for token in first} <= {"text"}
    assert "".join(token.content for token in first) == one_line(text)
    assert [token.content for token in last] == ["end"]


@given(TEXTS)
@example("1. a")
@example("# a")
@example("- a\n- b")
@example("===")
@example("    code")
def test_inline_text_is_a_plain_paragraph(text: str) -> None:
    shown = one_line(text)
    tokens = MARKDOWN.parse(inline(text))
    expected = ["paragraph_open", "inline", "paragraph_close"] if shown else []
    assert [token.type for token in tokens] == expected
    if shown:
        assert "".join(child.content for child in tokens[1].children or []) == shown


@given(TEXTS)
@example("``` | `")
def test_code_is_one_span_in_one_cell(text: str) -> None:
    first, _last = cells(code(text))
    if one_line(text):
        assert [(token.type, token.content) for token in first] == [("code_inline", one_line(text))]


@given(TEXTS)
@example("```\n# out of the block\n~~~")
@example("``````")
def test_a_block_is_one_fence_and_nothing_follows_from_it(text: str) -> None:
    tokens = MARKDOWN.parse(f"before\n\n{block(text)}\n\nafter\n")
    assert [token.type for token in tokens] == [
        "paragraph_open", "inline", "paragraph_close", "fence", "paragraph_open", "inline", "paragraph_close",
    ]  # fmt: skip
    assert tokens[3].content == visible(text).removesuffix("\n") + "\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x00\x1b[31m\x7f", "a␀␛[31m␡"),
        ("safe\u202etxt.exe", "safe\\u202etxt.exe"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        ("a\r\nb\tc", "a\nb\tc"),
        ("lone \ud800", "lone \\ud800"),
        ("žluťoučký 日本 👍", "žluťoučký 日本 👍"),
    ],
)
def test_hidden_characters_are_shown(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode()
