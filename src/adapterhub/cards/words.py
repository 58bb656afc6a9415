"""The author's own words in a card: ``notes.md``, and blocks of ``card.md.j2`` for named places.

Both are read from the release's folder, kept as they are, and made safe before they are printed: Markdown
without raw HTML, images or scripts' addresses, that cannot reach out of its place. A template may name facts
of the card and choose with ``if``; loops, calls and arithmetic are refused, so that rendering a stranger's
release is safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cards import escaping
from adapterhub.cards.authored import check_markdown
from adapterhub.errors import ReleaseError
from adapterhub.packaging.release import Release

if TYPE_CHECKING:
    from jinja2 import nodes

NOTES = "notes.md"
OVERRIDES = "card.md.j2"
PLACES: Mapping[str, int] = {"about": 2, "use": 3, "limits": 3, "training": 3}
"""Blocks of ``card.md.j2``, and the highest level that a heading has in each."""
NOTES_LEVEL = 3
MAX_BYTES = 64 * 1024


@dataclass(frozen=True)
class Words:
    """What an author wrote, as it was read."""

    notes: bytes | None = None
    overrides: bytes | None = None
    folder: Path = field(default=Path(), compare=False)

    @property
    def files(self) -> dict[str, bytes]:
        """The files themselves, by their path in the release."""
        found = {NOTES: self.notes, OVERRIDES: self.overrides}
        return {name: data for name, data in found.items() if data is not None}


def read_words(folder: Path) -> Words:
    """The author's files of a release folder. Raises ReleaseError for one that is too long."""
    return Words(_read(folder / NOTES), _read(folder / OVERRIDES), folder)


def take_words(release: Release) -> Release:
    """The release with its author's files listed as they lie there now: writing them is the author's right.

    Raises ReleaseError for one that is too long, and when the release is signed and they are others.
    """
    return release.with_files(read_words(release.path).files)


def render_words(words: Words, facts: Mapping[str, Any]) -> dict[str, str]:
    """Safe Markdown by place: the blocks of ``card.md.j2`` with ``facts`` put in, and ``notes``.

    Raises ReleaseError naming the file and the line for what may not stand there.
    """
    found = {}
    if words.overrides is not None:
        found = _render_blocks(words.folder / OVERRIDES, words.overrides, facts)
    if words.notes is not None:
        text = _decode(words.folder / NOTES, words.notes)
        found["notes"] = check_markdown(text, str(words.folder / NOTES), NOTES_LEVEL)
    return {place: text for place, text in found.items() if text.strip()}


def _read(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ReleaseError(f"{path} is over {MAX_BYTES} bytes", "make it shorter, and link to the rest")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise ReleaseError(f"{path} is not UTF-8 text: {err.reason}", "save it as UTF-8") from err


def _render_blocks(path: Path, data: bytes, facts: Mapping[str, Any]) -> dict[str, str]:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_print_fact, trim_blocks=True, lstrip_blocks=True
    )
    source = _decode(path, data)
    try:
        _check_template(path, environment.parse(source))
        template = environment.from_string(source)
        context = template.new_context(dict(facts))
        texts = {name: "".join(block(context)) for name, block in template.blocks.items()}
    except (TemplateError, RecursionError) as err:
        line = getattr(err, "lineno", None)
        where = f"{path}, line {line}" if line else str(path)
        known = ", ".join(sorted(facts))
        raise ReleaseError(f"{where}: {err}", f"mend the template; it may name {known}") from err
    return {name: check_markdown(text, f"{path}, block {name}", PLACES[name]) for name, text in texts.items()}


def _print_fact(value: object) -> str:
    """A fact as inline Markdown that is nothing but text."""
    from jinja2 import TemplateRuntimeError, Undefined

    if isinstance(value, Undefined):
        str(value)  # raises what the environment says of names that are not defined
    if not isinstance(value, str):
        raise TemplateRuntimeError("a name stands for several facts: name one of them")
    return escaping.inline(value)


def _check_template(path: Path, tree: nodes.Template) -> None:
    """Raise ReleaseError for a template that does more than name facts in blocks."""
    from jinja2 import nodes

    allowed = (
        nodes.Output, nodes.TemplateData, nodes.Name, nodes.Getattr, nodes.Const, nodes.If, nodes.CondExpr,
        nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Test,
    )  # fmt: skip
    for part in tree.body:
        if isinstance(part, nodes.Block):
            if part.name not in PLACES:
                raise _refuse(path, part, f"there is no place {part.name}")
            for inner in _walk(part.body):
                if not isinstance(inner, allowed):
                    raise _refuse(path, inner, f"{type(inner).__name__.lower()} is not allowed here")
        elif not (isinstance(part, nodes.Output) and _is_blank(part)):
            raise _refuse(path, part, "words outside a block belong to no place")


def _walk(parts: list[nodes.Node]) -> Iterator[nodes.Node]:
    for part in parts:
        yield part
        yield from _walk(list(part.iter_child_nodes()))


def _is_blank(output: nodes.Output) -> bool:
    from jinja2 import nodes

    return all(isinstance(part, nodes.TemplateData) and not part.data.strip() for part in output.nodes)


def _refuse(path: Path, node: nodes.Node, what: str) -> ReleaseError:
    return ReleaseError(
        f"{path}, line {node.lineno}: {what}",
        f"write words in blocks of these names: {', '.join(PLACES)}; facts by name, and if",
    )
