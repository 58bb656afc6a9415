"""Patterns of what should not be published: addresses, numbers of people and accounts, and secrets.

A pattern finds what has a shape. It misses names, addresses and whatever is written otherwise, and it takes
some numbers for telephone numbers: it says where to look.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from adapterhub.packaging.dataset.evidence import PersonalData
from adapterhub.packaging.splits import Split

_EXAMPLES = 3
_RESERVED_DOMAINS = (
    "example.com",
    "example.org",
    "example.net",
    "example.edu",
    ".example",
    ".test",
    ".invalid",
)


def _is_real_address(found: str) -> bool:
    return not found.casefold().endswith(_RESERVED_DOMAINS)  # RFC 2606


def _is_card(found: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1 annex B, Luhn)."""
    digits = [int(char) for char in found if char.isdigit()][::-1]
    doubled = [digit * 2 - 9 if digit > 4 else digit * 2 for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(found: str) -> bool:
    """The check digits of account numbers (ISO 13616, ISO/IEC 7064 MOD 97-10)."""
    bare = found.replace(" ", "")
    return (
        15 <= len(bare) <= 34 and int("".join(str(int(char, 36)) for char in bare[4:] + bare[:4])) % 97 == 1
    )


def _is_public_ip(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


def _is_phone(found: str) -> bool:
    return 9 <= sum(char.isdigit() for char in found) <= 15  # ITU-T E.164


def _anything(found: str) -> bool:
    return True


_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bsk-[A-Za-z0-9_-]{20,}\b|\bAKIA[0-9A-Z]{16}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|-----BEGIN [A-Z ]{0,24}PRIVATE KEY-----"
)
# One of these stands in each of them. Words are found much faster than patterns that begin with one of many.
_SECRET_MARKS = (
    "hf_",
    *(f"gh{kind}_" for kind in "pousr"),
    "sk-",
    "AKIA",
    *(f"xox{kind}-" for kind in "abprs"),
    "PRIVATE KEY-----",
)


def _holds_digit(text: str) -> bool:
    return any(digit in text for digit in "0123456789")  # many times as fast as a pattern


def _may_hold_secret(text: str) -> bool:
    return any(mark in text for mark in _SECRET_MARKS)


# kind, whether a text with or without digits needs to be searched at all, pattern, a check of what it found
_KINDS: tuple[tuple[str, Callable[[str], object], re.Pattern[str], Callable[[str], bool]], ...] = (
    (
        "e-mail address",
        re.compile("@").search,
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b", re.ASCII),
        _is_real_address,
    ),
    (
        "telephone number",
        re.compile(r"[+(]\d").search,
        re.compile(
            r"(?<![\w+(])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?|\(\d{2,5}\)[ .-]?)"
            r"\d(?:[ .-]?\d){5,12}(?!\w)"
        ),
        _is_phone,
    ),
    (
        "payment card number",
        re.compile(r"\d{4}[ -]?\d{4}").search,
        re.compile(
            r"(?<![\w.-])(?:4\d{3}|5[1-5]\d{2}|2[2-7]\d{2}|6(?:011|5\d{2})|3[47]\d{2})"
            r"(?:[ -]?\d){9,12}(?![\w.-])"
        ),
        _is_card,
    ),
    (
        "bank account number (IBAN)",
        re.compile(r"[A-Z]{2}\d{2}").search,
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b"),
        _is_iban,
    ),
    (
        "public IP address",
        re.compile(r"\d\.\d").search,
        re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)"),
        _is_public_ip,
    ),
    (
        "US social security number",
        re.compile(r"\d-\d").search,
        re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        _anything,
    ),
    (
        "access token or private key",
        _may_hold_secret,
        _SECRET,
        _anything,
    ),
)


_WITHOUT_DIGITS = ("e-mail address", "access token or private key")


class PersonalDataSearch:
    """Counts the rows in which each pattern is found."""

    def __init__(self) -> None:
        self._rows = {kind: 0 for kind, *_ in _KINDS}
        self._examples: dict[str, list[str]] = {kind: [] for kind, *_ in _KINDS}

    def add(self, split: Split, first: int, rows: Sequence[list[str]]) -> None:
        """Rows of a split, each as the texts of its messages; ``first``: how many went before."""
        for number, texts in enumerate(rows, first + 1):
            text = "\n".join(texts)
            for kind in find_personal_data(text):
                self._rows[kind] += 1
                if len(self._examples[kind]) < _EXAMPLES:
                    self._examples[kind].append(f"{split} row {number}")

    def finish(self) -> tuple[PersonalData, ...]:
        return tuple(
            PersonalData(kind=kind, rows=self._rows[kind], examples=tuple(self._examples[kind]))
            for kind in self._rows
        )


def find_personal_data(text: str) -> list[str]:
    """The kinds of personal or secret data that something in ``text`` has the shape of."""
    digits = _holds_digit(text)
    return [
        kind
        for kind, needs, pattern, check in _KINDS
        if (digits or kind in _WITHOUT_DIGITS)
        and needs(text)
        and any(check(found[0]) for found in pattern.finditer(text))
    ]
