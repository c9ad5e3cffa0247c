"""The HTTP application, assembled. Nothing happens at import, and nothing is loaded here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from server.cors import CORS, CrossOrigin
from server.errors import on_invalid_body, on_routing_error
from server.guard import PUBLIC_PATHS, Guard, Limits
from server.lifecycle import Lifecycle
from server.metrics import Metrics
from server.openapi import describe
from server.protocol.extras import UnknownFields
from server.protocol.sampling import SamplingDefaults
from server.response_store import ResponseStore
from server.routes import chat, completions, docs, messages, models, ops, responses, tokenize
from server.service import Service
from server.sse import leave_draining_to_us
from server.tolerance import Tolerance
from server.tools.style import ChatStyle
from skipllm_core.client import EngineClient
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults
from skipllm_core.tokenizer import Tokenizer


def build_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    chat_style: ChatStyle | None = None,
    metrics: Metrics | None = None,
    skip_defaults: SkipDefaults | None = None,
    skip_profile: SkipProfile | None = None,
    sampling_defaults: SamplingDefaults | None = None,
    api_keys: Sequence[str] = (),
    strict_params: bool = False,
    responses_store_size: int = 1000,
    responses_store_memory: int = 64 * 2**20,
    limits: Limits | None = None,
    model_aliases: Sequence[str] = (),
    cross_origin: CrossOrigin | None = None,
    root_path: str = "",
) -> FastAPI:
    """The application over an engine that may still be starting: until it is ready, /ready and
    the API answer 503. Whoever runs it drains it through `app.state.lifecycle`.

    Requests may name the model by `model_name`, which answers bear, and by `model_aliases`.
    `root_path` is where a proxy serves the API; paths come with or without it.
    """
    leave_draining_to_us()
    if metrics is None:
        metrics = Metrics(model_name)
        metrics.watch(engine)
    lifecycle = Lifecycle()
    app = FastAPI(
        title="SkipLLM",
        version=version("skipllm"),
        docs_url=None,  # `routes.docs` shows it
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,  # the guard has looked at it
        exception_handlers={
            HTTPException: on_routing_error,
            RequestValidationError: on_invalid_body,
        },
    )
    describe(app, public_paths=PUBLIC_PATHS, needs_key=bool(api_keys))
    app.state.lifecycle = lifecycle
    app.state.metrics = metrics
    app.state.service = Service(
        engine=engine,
        tokenizer=tokenizer,
        chat_style=chat_style or ChatStyle.of(tokenizer),
        model_name=model_name,
        model_aliases=tuple(model_aliases),
        metrics=metrics,
        lifecycle=lifecycle,
        unknown_fields=UnknownFields(is_strict=strict_params),
        sampling_defaults=sampling_defaults or SamplingDefaults(),
        skip_defaults=skip_defaults or SkipDefaults(),
        skip_profile=skip_profile,
        responses=ResponseStore(
            max_responses=responses_store_size, max_bytes=responses_store_memory
        ),
        version=app.version,
        created=int(time.time()),
    )
    for routes in (chat, completions, responses, messages, models, tokenize, ops, docs):
        app.include_router(routes.router)
    # The one added last is the first that a request meets.
    app.add_middleware(Guard, api_keys=api_keys, limits=limits or Limits(), metrics=metrics)
    app.add_middleware(Tolerance, root_path=root_path)
    if cross_origin is not None:
        app.add_middleware(CORS, rules=cross_origin)
    return app
