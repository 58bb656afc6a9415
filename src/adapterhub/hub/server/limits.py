"""How much one request may ask of the Hub."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    json_body: int = 8 << 20
    """bytes of a JSON or form body"""
    commit_body: int = 2 << 30
    """bytes of a commit's lines altogether"""
    regular_file: int = 10 << 20
    """bytes of a file that git holds itself; larger ones go through LFS"""
    multipart_over: int = 1 << 30
    """bytes above which a large file is sent in parts"""
    part: int = 128 << 20
    """bytes of one part"""
    address_lifetime: int = 6 * 3600
    """seconds for which a signed upload address is good"""
    page: int = 1000
    """entries of one page of a listing"""

    @property
    def commit_line(self) -> int:
        """Bytes of one line of a commit: a regular file in base64, and its path."""
        return self.regular_file * 4 // 3 + (64 << 10)
