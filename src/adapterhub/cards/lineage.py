"""Where a release comes from as an SVG picture: base, data and earlier versions, joined to the release."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from adapterhub.cards.card import Card
from adapterhub.cards.escaping import one_line

_WIDTH, _ROW, _TOP, _RAIL, _TEXT = 420, 56, 14, 22, 58
_NAME_CHARS, _DETAIL_CHARS = 44, 60
_TITLE = "Lineage"


@dataclass(frozen=True)
class Ancestor:
    """Something the release was made from, or the release itself."""

    role: str
    name: str
    detail: str


def list_ancestors(card: Card) -> list[Ancestor]:
    """What the picture shows, top to bottom; the release comes last."""
    return [*_sources(card), _release(card)]


def describe_lineage(card: Card) -> str:
    """The picture in words: its text alternative."""
    *sources, release = list_ancestors(card)
    made = "; ".join(f"{source.role} {source.name} ({source.detail})" for source in sources)
    return f"{release.name} was made from: {made}."


def draw_lineage(card: Card) -> str:
    """An inline SVG element in the page's colours; the same release gives the same bytes."""
    ancestors = list_ancestors(card)
    height = _TOP + _ROW * len(ancestors)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'aria-labelledby="lineage-title lineage-desc" '
        'font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, Arial, sans-serif" font-size="13">\n'
        f'<title id="lineage-title">{_TITLE}</title>\n'
        f'<desc id="lineage-desc">{_safe(describe_lineage(card))}</desc>\n'
        + "".join(_draw(ancestors))
        + "</svg>"
    )


def _sources(card: Card) -> Iterator[Ancestor]:
    manifest, base = card.manifest, card.base
    if manifest.parent is not None:
        is_earlier = manifest.kind == "adapter" and card.retarget is None
        role = "earlier version" if is_earlier else "adapter"
        yield Ancestor(role, manifest.parent.ref, f"manifest {manifest.parent.manifest_sha256[:12]}")
    at = f"commit {base.revision[:12]}" if base.revision else f"digest {base.digest[:12]}"
    yield Ancestor("base model", base.name, at)
    for data in card.rows("train"):
        yield Ancestor("training data", data.source, f"{data.rows:,} rows, sha256 {data.sha256[:12]}")


def _release(card: Card) -> Ancestor:
    manifest = card.manifest
    made = {"adapter": "trained", "merged": "merged", "quantized": "merged and quantized"}[manifest.kind]
    if card.retarget is not None:
        made = "re-fitted"
    name = f"{manifest.name} {manifest.version}"
    return Ancestor("this release", name, f"{made} {manifest.created:%Y-%m-%d}")


def _draw(ancestors: list[Ancestor]) -> Iterator[str]:
    last = len(ancestors) - 1
    bottom = _middle(last)
    yield (
        f'<path d="M{_RAIL} {_middle(0) + 14}V{bottom}" fill="none" stroke="var(--line)" stroke-width="2"/>\n'
    )
    for row, ancestor in enumerate(ancestors):
        middle = _middle(row)
        if row < last:
            yield (
                f'<path d="M{_TEXT - 16} {middle}H{_RAIL + 14}q-14 0 -14 14" fill="none" '
                'stroke="var(--line)" stroke-width="2"/>\n'
                f'<circle cx="{_TEXT - 14}" cy="{middle}" r="5" fill="var(--series-2)"/>\n'
            )
        else:
            yield f'<circle cx="{_RAIL}" cy="{middle}" r="8" fill="var(--series-1)"/>\n'
        weight = 600 if row == last else 500
        name = _shorten(ancestor.name, _NAME_CHARS)
        yield _text(middle - 3, name, f'fill="var(--ink)" font-weight="{weight}"')
        detail = _shorten(f"{ancestor.role}: {ancestor.detail}", _DETAIL_CHARS)
        yield _text(middle + 14, detail, 'fill="var(--ink-soft)" font-size="11"')


def _middle(row: int) -> int:
    return _TOP + row * _ROW + 16


def _text(y: int, text: str, style: str) -> str:
    return f'<text x="{_TEXT}" y="{y}" {style}>{_safe(text)}</text>\n'


def _shorten(text: str, most: int) -> str:
    """At most so many characters as fit, the middle left out; the description has all of them."""
    shown = one_line(text)
    return shown if len(shown) <= most else f"{shown[: most - 17]}…{shown[-16:]}"


def _safe(text: str) -> str:
    return escape(one_line(text))
