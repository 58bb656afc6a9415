"""Texts as words, and sequences of them as numbers: what duplicates of passages are found by."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

SEQUENCE: Final = 13
"""Words of a sequence, as in GPT-3's comparison with benchmarks (arXiv 2005.14165, appendix C)."""
# Chinese characters, kana and Hangul syllables stand without blanks between words: each counts as one.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(29)


def split_words(text: str) -> list[str]:
    """The words of a text, case folded, without punctuation."""
    return _WORD.findall(text.casefold())


def hash_sequences(texts: Iterable[list[str]]) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
    """Every run of 13 words of each text -> (its hash, the text's index), both of the same length.

    The hashes are 64 bits, and good within one process only, as Python's own for text are.
    """
    words, lengths = [], []
    for text in texts:
        words += text
        lengths.append(len(text))
    count = len(words) - SEQUENCE + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.intp)
    each = _mix(np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64))
    owner = np.repeat(np.arange(len(lengths), dtype=np.intp), lengths)
    hashes = np.zeros(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(SEQUENCE):
            hashes = hashes * _FACTOR + each[offset : offset + count]
    inside = owner[:count] == owner[SEQUENCE - 1 :]  # not from the end of one text into the next
    return _mix(hashes[inside]), owner[:count][inside]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread what differs in low bits over all of them."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> _SHIFT)) * _FACTOR
    return values ^ (values >> _SHIFT)
