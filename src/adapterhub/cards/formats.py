"""Figures in words: one way to print each kind of value, in tables, pages and on the terminal."""

from __future__ import annotations

from datetime import datetime

from adapterhub.packaging.evidence import Score
from adapterhub.packaging.manifest import Hardware, Quantization

NOT_MEASURED = "not measured"
METRICS = {
    "exact_match": "exact match",
    "loss": "held-out loss",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
}
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def in_bytes(count: int | None) -> str:
    """``19_922_944`` -> ``19.0 MiB``; None was not measured."""
    if count is None:
        return NOT_MEASURED
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,} B"


def in_percent(share: float) -> str:
    """``0.84`` -> ``84.0 %``."""
    return f"{100 * share:.1f} %"


def in_figures(value: float | None) -> str:
    """A loss or a rate with four digits after the point, or three significant ones when it is small."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def in_percent_interval(interval: tuple[float, float]) -> str:
    """``(0.783, 0.884)`` -> ``78.3 to 88.4 %``."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def in_interval(interval: tuple[float, float] | None) -> str:
    """``1.2050 to 1.3124``; None was not measured."""
    if interval is None:
        return NOT_MEASURED
    return f"{in_figures(interval[0])} to {in_figures(interval[1])}"


def in_p_value(value: float | None) -> str:
    """A test's p, with three digits after the point; None where nothing was tested."""
    if value is None:
        return "not tested"
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def in_time(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def in_days(moment: datetime) -> str:
    """``2026-01-31 12:00 UTC``; the moment is in UTC."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def value_of(score: Score, value: float) -> str:
    """One side's figure, in percent for shares."""
    return in_percent(value) if score.metric == "exact_match" else in_figures(value)


def interval_of(score: Score, interval: tuple[float, float] | None) -> str:
    """The 95 % interval, like ``78.3 to 88.4 %``."""
    if score.metric == "exact_match" and interval is not None:
        return in_percent_interval(interval)
    return in_interval(interval)


def rows_of(score: Score) -> str:
    """How many rows a figure is over, and how many tokens where it is a mean over those."""
    return f"{score.rows:,} rows" + (f", {score.tokens:,} tokens" if score.tokens is not None else "")


def hardware_in_words(hardware: Hardware) -> str:
    """``AMD EPYC 7R13 (2 cores, 7.6 GiB)``."""
    unit = {"cpu": "core", "cuda": "GPU"}[hardware.device] + ("s" if hardware.count > 1 else "")
    each = " each" if hardware.device == "cuda" and hardware.count > 1 else ""
    return f"{hardware.name} ({hardware.count} {unit}, {in_bytes(hardware.memory_bytes)}{each})"


def quantization_in_words(quantization: Quantization | None) -> str:
    """``4 bits (NF4, double quantization)``."""
    if quantization is None:
        return "16 bits"
    if quantization.type == "int8":
        return "8 bits (LLM.int8())"
    double = ", double quantization" if quantization.double else ""
    return f"4 bits ({quantization.type.upper()}{double})"


def quantization_in_full(quantization: Quantization | None) -> str:
    """``4 bits (NF4, double quantization), blocks of 64, computing in bfloat16``."""
    words = quantization_in_words(quantization)
    if quantization is None or quantization.type == "int8":
        return words
    return f"{words}, blocks of {quantization.block_size}, computing in {quantization.compute_dtype}"
