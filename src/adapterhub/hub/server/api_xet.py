"""What a client with hf_xet asks before it uploads."""

from __future__ import annotations

import secrets
import time

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapterhub.hub.server import xet
from adapterhub.hub.server.calls import Call, endpoint
from adapterhub.hub.server.refusals import Refusal


def write_token(call: Call) -> Response:
    """Where hf_xet may write: a folder of this machine. Its token is a formality."""
    repo = call.repo()
    call.contributor()
    if not call.hub.xet:
        raise _refused()
    files, lifetime = call.hub.store.large_files(repo), call.hub.limits.address_lifetime
    files.drop_abandoned(lifetime)
    address, token, end = (
        f"local://{xet.new_folder(files)}",
        secrets.token_hex(8),
        int(time.time()) + lifetime,
    )
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
    return JSONResponse({"casUrl": address, "accessToken": token, "exp": end}, headers=headers)


def read_token(call: Call) -> Response:
    """Files are never read through Xet here: no answer carries an X-Xet-Hash."""
    call.repo()
    raise _refused()


def _refused() -> Refusal:
    return Refusal(404, "This Hub has no Xet storage: set HF_HUB_DISABLE_XET=1 to use git-lfs", "XetNotFound")


_REPO = "/api/{kind}/{owner}/{name}"

ROUTES = [
    Route(f"{_REPO}/xet-read-token/{{revision}}", endpoint(read_token)),
    Route(f"{_REPO}/xet-write-token/{{revision}}", endpoint(write_token)),
]
