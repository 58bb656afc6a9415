"""How long rows are, counted into bins that grow with the length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from adapterhub.packaging.dataset.evidence import Lengths

_UPPER: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class TokenCounter:
    """Counts a text's tokens, without special tokens."""

    name: str
    """How the card names the tokenizer."""
    sha256: str
    """Of its tokenizer.json."""
    count: Callable[[list[str]], list[int]]
    """Texts to the tokens of each."""


class LengthCount:
    """The lengths of one split's rows."""

    def __init__(self, counter: TokenCounter | None) -> None:
        self._counter = counter
        self._bins = [0] * (len(_UPPER) + 1)
        self._total = 0
        self._longest = 0

    def add(self, rows: Sequence[list[str]], words: Sequence[int]) -> None:
        """The next rows: each as the texts of its messages, and its number of words."""
        for length in self._lengths(rows, words):
            self._bins[next((at for at, upper in enumerate(_UPPER) if length <= upper), len(_UPPER))] += 1
            self._total += length
            self._longest = max(self._longest, length)

    def _lengths(self, rows: Sequence[list[str]], words: Sequence[int]) -> Sequence[int]:
        if self._counter is None:
            return words
        counts = iter(self._counter.count([text for row in rows for text in row]))
        return [sum(next(counts) for _ in row) for row in rows]

    def finish(self) -> Lengths:
        """The bins up to the last that is not empty."""
        used = max((at for at, rows in enumerate(self._bins) if rows), default=0) + 1
        upper = (*_UPPER, max(self._longest, _UPPER[-1] + 1))
        return Lengths(
            unit="words" if self._counter is None else "tokens",
            tokenizer=self._counter.name if self._counter else None,
            tokenizer_sha256=self._counter.sha256 if self._counter else None,
            upper=upper[:used],
            rows=tuple(self._bins[:used]),
            total=self._total,
            longest=self._longest,
        )
