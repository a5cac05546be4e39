"""Who is answered: the page that this command served, on this machine, and nobody else.

A page of another site may send requests to 127.0.0.1. By a name of its own that leads there (DNS rebinding) it could
read the answers too. So three things must fit: the Host, the Origin where there is one, and a token in the path.
"""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer: nothing but the page's own files runs in it, and no other site shows or reads it."""


class Guard:
    """Lets requests through whose Host, Origin and token fit; there are no websockets here.

    Args:
        app: what is guarded.
        port: that it is served on.
        token: the first part of every path.
    """

    def __init__(self, app: ASGIApp, port: int, token: str) -> None:
        self._app, self._token = app, token
        suffix = "" if port == 80 else f":{port}"
        self._hosts = {f"{name}{suffix}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        why = self.refusal(scope)
        answer = self._app if why is None else PlainTextResponse(f"{why}\n", status_code=403)
        await answer(scope, receive, hardened)

    def refusal(self, scope: Scope) -> str | None:
        """Why a request is refused, or None."""
        headers = Headers(scope=scope)
        hosts = [host.lower() for host in headers.getlist("host")]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return "This page is for this machine alone: open it at 127.0.0.1."
        if any(origin.lower() != f"http://{hosts[0]}" for origin in headers.getlist("origin")):
            return "Another site's page asked for this: open the address that the command printed."
        is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if is_foreign and headers.get("sec-fetch-mode") != "navigate":
            return "Another site's page asked for this: open the address that the command printed."
        given = scope["path"].removeprefix("/").partition("/")[0]
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return "The address lacks its token: open the one that the command printed."
        return None
