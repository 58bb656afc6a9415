"""JSON as clients send it."""

from __future__ import annotations

import json
from typing import Any

from adapterhub.hub.server.refusals import bad_request


def parse_json(raw: bytes | bytearray) -> Any:
    """The document. Refuses what is not JSON, and text that UTF-8 cannot hold: nothing here can be that."""
    try:
        document = json.loads(raw)
        if b"\\ud" in raw.lower():
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise bad_request(
            "A document in the request is not JSON, or holds half of a surrogate pair"
        ) from None
    return document
