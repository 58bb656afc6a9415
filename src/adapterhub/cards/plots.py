"""Plots as SVG pictures that follow the page's colours and say in words what they show."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from adapterhub.packaging.evidence import CurveEvidence, LayerError

# matplotlib wants colours, the picture wants the reader's: each stands for a CSS variable, put in afterwards.
_INK, _FAINT, _TRAIN, _HELD_OUT = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
_VARIABLES = {_INK: "--ink-soft", _FAINT: "--line", _TRAIN: "--series-1", _HELD_OUT: "--series-2"}
_STANDALONE_STYLE = """<style>
:root { --ink: #18202b; --ink-soft: #4a5361; --line: #d9dee6; --series-1: #2563a8; --series-2: #b4520a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ecf2; --ink-soft: #aab4c2; --line: #38414e; --series-1: #7db4f0; --series-2: #f0a868; }
}
</style>"""
# A loss that falls by more than this factor is drawn on a logarithmic scale.
_LOG_RATIO = 20.0
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "adapterhub",  # ids that do not change from run to run
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so measures are the same everywhere
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_curve(curve: CurveEvidence, description: str) -> str:
    """The loss by step as an inline SVG element that scales; its colours are the page's variables.

    ``description`` is its text alternative. The same curve gives the same bytes with the same matplotlib.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    train = [(point.step, point.loss) for point in curve.points if point.loss is not None]
    held_out = [(point.step, point.eval_loss) for point in curve.points if point.eval_loss is not None]
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes = figure.subplots()
        if train:
            axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1.6, label="training")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True),
                color=_HELD_OUT,
                linewidth=1.4,
                linestyle="--",
                marker="o",
                markersize=5,
                label="held out",
            )
        _dress(axes, [loss for _, loss in train + held_out])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _finish(buffer.getvalue(), "curve", "Training curve", description)


def draw_layers(layers: Sequence[LayerError], description: str) -> str:
    """The relative error after each decoder layer as an inline SVG element, like ``draw_curve``'s."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(5.6, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(layers)), [layer.relative_error for layer in layers], color=_TRAIN, width=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("relative error")
        axes.grid(axis="y", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _finish(buffer.getvalue(), "layers", "Error by layer", description)


def standalone(svg: str) -> bytes:
    """An inline SVG as a file of its own, with colours for light and dark."""
    opening, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}>\n{_STANDALONE_STYLE}{rest}\n'.encode()


def _dress(axes: Axes, losses: Sequence[float]) -> None:
    """Scales, labels, grid and key."""
    from matplotlib.ticker import MaxNLocator

    lowest, highest = min(losses, default=0.0), max(losses, default=0.0)
    label = "loss (nats a token)"
    if lowest > 0 and highest / lowest > _LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _position: "")
        label = "loss (nats a token, log scale)"
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(axis="y", linewidth=0.7)
    axes.tick_params(length=0)
    axes.legend(frameon=False, loc="upper right")


def _finish(svg: str, name: str, title: str, description: str) -> str:
    """matplotlib's file as an element: page colours, ids of its own, and a title and description."""
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    start = svg.index("<svg")
    body = svg[svg.index(">", start) + 1 :].strip()
    # The style sheet would reach out of the picture into the page; its two rules go to the root instead.
    body = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", body, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[1]}" role="img" aria-labelledby="{name}-title {name}-desc" '
        'stroke-linejoin="round" stroke-linecap="butt">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>\n{body}'
    )
