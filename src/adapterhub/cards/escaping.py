"""Text from a release made safe to print: in Markdown prose, table cells, code spans and fenced blocks.

Models and data write what they like; none of it may become markup, break a table, or reorder what is read.
"""

from __future__ import annotations

import re

_ACTIVE = re.compile(r"([\\`*_\[\]|~$])")
# What would begin a heading, list, quote, rule or setext underline when it comes first on its line.
_LINE_START = re.compile(r"^(\d{1,9})([.)])(?=\s|$)|^([#+\-=:])")
_PICTURE_OF_DELETE = "\u2421"
# Direction overrides and isolates, and invisible characters that hide text (Unicode TR 36, section 3.4).
_HIDDEN = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff\ufffe\uffff]")


class Markdown(str):
    """Text that is Markdown already, not to be escaped again."""

    __slots__ = ()


def visible(text: str) -> str:
    """Control, direction and invisible characters as something that can be seen; line feeds and tabs stay."""
    shown = "".join(_picture(char) for char in text.replace("\r\n", "\n"))
    return _HIDDEN.sub(lambda match: f"\\u{ord(match[0]):04x}", shown)


def one_line(text: str) -> str:
    """``text`` without control characters or line breaks."""
    return " ".join(visible(text).split())


def inline(value: object) -> Markdown:
    """A value as one line of plain Markdown text, safe in a sentence and in a table cell."""
    if isinstance(value, Markdown):
        return value
    text = one_line(str(value))
    text = _ACTIVE.sub(r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markdown(_LINE_START.sub(_escape_start, text))


def code(value: object) -> Markdown:
    """A value as a code span that is safe in a table cell: one line, with a fence longer than any inside."""
    text = one_line(str(value))
    if not text:
        return Markdown("(empty)")
    fence = "`" * (_longest_run(text) + 1)
    padded = f" {text} " if text.startswith("`") or text.endswith("`") else text
    # GFM splits cells before it reads code spans, and takes the backslash away again.
    return Markdown(fence + padded.replace("|", "\\|") + fence)


def block(value: object, language: str = "text") -> Markdown:
    """A value as a fenced block, line by line as it is, with a fence longer than any inside."""
    text = visible(str(value))
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _picture(char: str) -> str:
    """The Unicode control picture of a C0 control or DEL, an escape for a C1 control, else the character."""
    code_point = ord(char)
    if char in "\n\t" or 0x20 <= code_point < 0x7F or code_point >= 0xA0:
        return char
    if code_point < 0x20:
        return chr(0x2400 + code_point)
    return _PICTURE_OF_DELETE if code_point == 0x7F else f"\\x{code_point:02x}"


def _escape_start(match: re.Match[str]) -> str:
    return f"{match[1]}\\{match[2]}" if match[1] else f"\\{match[3]}"
