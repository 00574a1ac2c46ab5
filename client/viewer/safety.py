"""What every answer of the viewer's server carries, and who gets one."""

from __future__ import annotations

import secrets
from http.cookies import SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "viewer-token"
# The page runs its own scripts and nothing else, and talks to its own server alone.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware: security headers on every answer; with a `token` no answer without it.

    The token is taken from the address (`?token=`) once and then from a cookie. Without a token the server is
    on loopback, and a request whose Host is another name is refused: a page elsewhere may have made that name
    point here.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        cookie = ""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if cookie:
                    headers.append("Set-Cookie", cookie)
            await send(message)

        refusal = self._refusal(scope)
        if refusal:
            await PlainTextResponse(refusal, 403)(scope, receive, answer)
            return
        if self._token and _query_token(scope):
            cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
        await self._app(scope, receive, answer)

    def _refusal(self, scope: Scope) -> str:
        """Why a request gets no answer; empty where it gets one."""
        headers = Headers(scope=scope)
        if self._token is None:
            host = headers.get("host", "").rsplit(":", 1)[0].strip("[]")
            return "" if host in LOOPBACK else "this server answers to 127.0.0.1 alone: open its own address"
        stored = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        for given in (_query_token(scope), stored.value if stored else ""):
            if secrets.compare_digest(given.encode(), self._token.encode()):
                return ""
        return "the address lacks its token: open the one that the command printed"


def _query_token(scope: Scope) -> str:
    query: bytes = scope["query_string"]
    return parse_qs(query.decode("latin-1")).get("token", [""])[-1]
