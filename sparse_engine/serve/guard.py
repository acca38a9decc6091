"""What every request passes before the application: the key, and a body that is neither too large nor too slow.

Plain ASGI: nothing of a body is kept that is refused, and a client is heard out before it is refused, or it would see a
reset connection where the answer is.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from .refusals import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOCKED = ("/v1/", "/metrics")  # what a key is needed for
HEARD_OUT = 32 << 20  # bytes of a body too large that are read and dropped
BODY_SECONDS = 30.0  # that a client has to send a body
JSON_TYPE = "application/json"  # no other: a page of another site cannot send it without asking first
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """An application behind the checks.

    Args:
        app: what is guarded.
        max_body: bytes.
        api_key: that requests for ``LOCKED`` paths show as a bearer token; None is none.
    """

    def __init__(self, app: App, max_body: int, api_key: str | None) -> None:
        self._app, self._max_body, self._key = app, max_body, api_key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in SECURITY.items())]
            await send(message)

        try:
            if scope["method"] == "POST":
                body = await self._body(Headers(scope=scope), receive)
                self._check_key(scope)
                receive = _again(body, receive)
            else:
                self._check_key(scope)
        except Refusal as refusal:
            headers = {**refusal.headers, "connection": "close"} if refusal.status in (408, 413) else refusal.headers
            await JSONResponse(refusal.body(), refusal.status, headers)(scope, receive, secured)
            return
        except ClientGone:
            return
        await self._app(scope, receive, secured)

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        if self._key is None or not scope["path"].startswith(LOCKED):
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._key.encode()):
            raise Refusal(401, "send the service's key: Authorization: Bearer KEY", "invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """A POST's body. Raises Refusal, or ClientGone."""
        length = headers.get("content-length", "0")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(int(length) if length.isdecimal() else 0, receive)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:g} s", "slow_body") from None
        if headers.get("content-type", "").partition(";")[0].strip().lower() != JSON_TYPE:
            raise Refusal(415, f"send JSON, with the header Content-Type: {JSON_TYPE}", "not_json")
        return body

    async def _read(self, announced: int, receive: Receive) -> bytes:
        size, parts, more = 0, [], announced <= HEARD_OUT
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            size += len(message.get("body", b""))
            if size <= self._max_body:
                parts.append(message.get("body", b""))
            more = message.get("more_body", False) and size <= HEARD_OUT
        if max(size, announced) > self._max_body:
            raise Refusal(413, f"the body is larger than {self._max_body} bytes", "body_too_large")
        return b"".join(parts)


class ClientGone(Exception):
    """The client has closed the connection."""


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, once more; after it what comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
