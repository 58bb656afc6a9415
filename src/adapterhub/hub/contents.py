"""What a file must turn out to be, and the digests that tell."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

_HASHED_ASIDE: Final = 32 << 20  # bytes of a file above which a thread of its own hashes it
_UNHASHED: Final = 16  # chunks that may wait for that thread


@dataclass(frozen=True)
class Content:
    """What a file must turn out to be; one of the two digests is there."""

    size: int
    """Bytes."""
    sha256: str | None = None
    """64 hex digits."""
    blob: str | None = None
    """git's name for the content (sha1 of a header and the bytes), of a file that git holds itself."""

    @property
    def name(self) -> str:
        """What the Hugging Face cache calls it: git's name, or else the sha256."""
        name = self.blob or self.sha256
        assert name is not None
        return name


class Digest:
    """The sha256 of a file's bytes as they come, and git's name if that is what is known of it."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(b"blob %d\0" % content.size, usedforsecurity=False)
        self._thread = ThreadPoolExecutor(1) if content.size > _HASHED_ASIDE else None
        self._waiting: deque[Future[None]] = deque()

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._thread is None:
            self._update(data)
            return
        if len(self._waiting) >= _UNHASHED:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._update, data))

    def _update(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._content.sha256 is None:
            self._blob.update(data)

    def close(self) -> None:
        """Wait until all bytes are counted in; none may come after."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    @property
    def sha256(self) -> str:
        """64 hex digits, once it is closed."""
        return self._sha256.hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether the bytes were those of the content, once it is closed."""
        if self._content.sha256 is not None:
            return self.sha256 == self._content.sha256
        return self._blob.hexdigest() == self._content.blob
