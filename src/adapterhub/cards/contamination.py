"""What scored rows and benchmark questions share with the rows that an adapter was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterhub.packaging.dataset.words import hash_sequences, split_words
from adapterhub.packaging.rows import canonical

Messages = Sequence[dict[str, str]]
_ROWS_AT_ONCE = 1024


def find_same_prompts(rows: Sequence[Messages], train: Sequence[Messages]) -> list[int]:
    """Indices of ``rows`` whose whole prompt (every message before the last) a training row answers too.

    Every assistant turn of a training row counts as an answer to what stands before it. System messages and
    white space around a message are left out.
    """
    answered = {
        _key(messages[:at])
        for messages in train
        for at, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    return [index for index, messages in enumerate(rows) if _key(messages[:-1]) in answered]


def find_shared_sequences(texts: Sequence[str], train: Sequence[Messages]) -> list[int]:
    """Indices of ``texts`` that share 13 words in a row with a training row's messages but the system's.

    A text of fewer than 13 words is never found; case and punctuation do not count.
    """
    wanted, owners = hash_sequences([split_words(text) for text in texts])
    found = np.zeros(len(wanted), dtype=bool)
    for start in range(0, len(train), _ROWS_AT_ONCE):
        part = train[start : start + _ROWS_AT_ONCE]
        hashes, _ = hash_sequences([split_words(text_of(messages)) for messages in part])
        found |= np.isin(wanted, hashes)
    return sorted({int(owner) for owner in owners[found]})


def text_of(messages: Messages) -> str:
    """All that is said, without system messages, which many rows share by design."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def _key(messages: Messages) -> bytes:
    spoken = [
        [message["role"], message["content"].strip()] for message in messages if message["role"] != "system"
    ]
    return canonical(spoken)
