"""Which pages of other origins may use the server: starlette's CORS, refusals in our own form."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.errors import ErrorReply


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossOrigin:
    """What pages of other origins may do; `*` is all."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False


class CORS(CORSMiddleware):
    """Outermost: a preflight bears no key, and every answer has to have the headers, errors too."""

    def __init__(self, app: ASGIApp, rules: CrossOrigin) -> None:
        super().__init__(
            app,
            allow_origins=rules.origins,
            allow_methods=rules.methods,
            allow_headers=rules.headers,
            allow_credentials=rules.credentials,
            expose_headers=("x-request-id", "retry-after"),
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        reply = super().preflight_response(request_headers)
        if reply.status_code != 200:
            reason = bytes(reply.body).decode()  # "Disallowed CORS origin, headers"
            headers = {k: v for k, v in reply.headers.items() if not k.startswith("content-")}
            reply = ErrorReply(reply.status_code, f"{reason}.", headers=headers).response()
        reply.headers["x-request-id"] = uuid.uuid4().hex
        return reply
