"""Addresses that carry their own permission: what, for how long, signed with the Hub's key.

The client sends no token with the bytes of a large file, so the address itself must prove that somebody who
may write asked for it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlencode

from adapterhub.hub.server.files import replace_file
from adapterhub.hub.server.refusals import Refusal

KEY_FILE = "secret"


class Signer:
    """Signs paths with HMAC-SHA256 and checks them. The key outlives a restart, as uploads do."""

    def __init__(self, root: Path, lifetime: int) -> None:
        """``lifetime``: seconds for which a signed address is good."""
        path = root / KEY_FILE
        if not path.exists():
            replace_file(path, secrets.token_bytes(32), mode=0o600)
        path.chmod(0o600)
        self._key = path.read_bytes()
        self._lifetime = lifetime

    def sign(self, method: str, path: str, **values: str | int) -> str:
        """``path?…&expires=…&signature=…``, good for this method and these values alone."""
        query = {name: str(value) for name, value in sorted(values.items())}
        query["expires"] = str(int(time.time()) + self._lifetime)
        return f"{path}?{urlencode({**query, 'signature': self._signature(method, path, query)})}"

    def check(self, method: str, path: str, query: Mapping[str, str]) -> None:
        """Refuse an address that was not signed here, was changed, or has expired."""
        values = {name: value for name, value in query.items() if name != "signature"}
        if not hmac.compare_digest(self._signature(method, path, values), query.get("signature", "")):
            raise Refusal(403, "The signature of this address is not right", "SignatureMismatch")
        if int(values["expires"]) < time.time():
            raise Refusal(403, "This address has expired; ask for a new one", "AddressExpired")

    def _signature(self, method: str, path: str, values: Mapping[str, str]) -> str:
        text = "\n".join([method, path, *(f"{name}={values[name]}" for name in sorted(values))])
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
