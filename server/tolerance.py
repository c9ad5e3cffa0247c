"""Accepts what means the same: HEAD where GET is answered, a slash at the end of a path, and the
prefix below which a proxy serves the API."""

from __future__ import annotations

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Tolerance:
    """ASGI middleware. Behind it there is no HEAD, and no path with a slash too many; nothing is
    redirected, as clients lose bodies and keys on the way.

    Paths may have the prefix `root_path` or not, as proxies take it away or do not.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "root_path": self._root_path}
        if get_route_path(scope).strip("/"):  # not the root itself, wherever that is
            scope = {**scope, "path": scope["path"].rstrip("/")}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                if message.get("more_body", False):
                    return
                message = {"type": "http.response.body"}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
