"""POST /v1/messages and /v1/messages/count_tokens: chats in Anthropic's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastapi import Request
from starlette.responses import Response

from server.errors import HTTPError, json_response
from server.messages.chat import to_chat
from server.messages.form import MessagesForm
from server.openapi import answers
from server.protocol.messages import CountTokensRequest, MessagesRequest
from server.protocol.schemas_messages import (
    MessageEvent,
    MessageObject,
    MessagesError,
    MessageTokens,
)
from server.routes.answering import answer, refuse_early, unless_disconnected
from server.routes.chat import begin_chat, encode_chat
from server.routes.strict import StrictRouter
from server.service import Service
from server.translation import in_the_clients_names
from skipllm_core.errors import ContextLengthError

router = StrictRouter()


@router.post("/v1/messages", **answers(MessageObject, stream=MessageEvent, error=MessagesError))
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answers a conversation, in one or, with `stream`, as it is generated."""
    service: Service = request.app.state.service
    chat, names = to_chat(body)
    with _in_anthropics_words(names):
        _, generation = await begin_chat(service, request, chat)
        form = MessagesForm(service, generation, names, request.state.request_id)
        return await answer(request, generation, form, stream=bool(body.stream))


@router.post("/v1/messages/count_tokens", **answers(MessageTokens, error=MessagesError))
async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """Counts the tokens of a conversation as the model would be given it."""
    service: Service = request.app.state.service
    chat, names = to_chat(body)
    with _in_anthropics_words(names):
        refuse_early(service, chat)
        token_ids = await unless_disconnected(request.receive, encode_chat(service, chat))
    return json_response({"input_tokens": len(token_ids)})


@contextmanager
def _in_anthropics_words(names: Mapping[str, str]) -> Iterator[None]:
    with in_the_clients_names(names):
        try:
            yield
        except ContextLengthError as error:
            raise HTTPError(
                400,
                f"prompt is too long: {error.num_prompt_tokens} tokens > "
                f"{error.max_model_len} maximum",
            ) from None
