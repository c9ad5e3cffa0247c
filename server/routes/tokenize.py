"""POST /tokenize and /detokenize"""

from __future__ import annotations

import functools
from typing import Annotated

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from server.errors import json_response
from server.openapi import answers
from server.protocol.base import TokenId, Wire
from server.protocol.chat import MAX_MESSAGES, ChatMessage, ChatRequest, TemplateOptions
from server.protocol.sampling import check_token_ids
from server.protocol.schemas import Text, Tokens
from server.protocol.tools import Tools
from server.routes.chat import encode_chat
from server.routes.strict import StrictRouter
from server.service import Service
from skipllm_core.errors import ContextLengthError, InvalidRequestError

router = StrictRouter()

Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class TokenizeRequest(Wire):
    """Exactly one of `prompt`, `content` (the same) and `messages`."""

    model: str | None = None
    """A name of the model; without one, the model that is served."""
    prompt: str | None = None
    """A text, as /v1/completions reads it."""
    content: str | None = None
    """The same as `prompt`, under llama.cpp's name."""
    messages: Messages | None = None
    """A conversation, as /v1/chat/completions reads it."""
    add_special_tokens: bool = True
    """Whether tokens as the begin of a sequence are added to a text."""
    add_generation_prompt: bool = True
    """Whether the template opens the assistant's turn."""
    continue_final_message: bool = False
    """Whether the last message is left open."""
    chat_template_kwargs: TemplateOptions | None = None
    """Switches of the model's chat template."""
    tools: Tools | None = None
    """The functions that the model is told of, with a conversation."""
    return_token_strs: bool | None = None
    """Whether to tell how the vocabulary spells the tokens."""


class DetokenizeRequest(Wire):
    model: str | None = None
    """A name of the model; without one, the model that is served."""
    tokens: list[TokenId]
    """The token ids to spell."""


@router.post("/tokenize", **answers(Tokens))
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Tells the tokens of a text or a conversation."""
    service: Service = request.app.state.service
    service.check_ready()
    service.check_model(body.model)
    service.unknown_fields.check(body.model_extra)
    given = [v for v in (body.prompt, body.content, body.messages) if v is not None]
    if len(given) != 1:
        raise InvalidRequestError("Give exactly one of 'prompt', 'content' and 'messages'.")
    try:
        token_ids = await _encode(service, body)
    except ContextLengthError as error:
        raise InvalidRequestError(str(error), param="prompt", code=error.code) from None
    max_model_len = service.engine.info.max_model_len
    pieces = map(service.tokenizer.token_piece, token_ids)
    return json_response(
        {
            "tokens": token_ids,
            "count": len(token_ids),
            "max_model_len": max_model_len,
            "token_strs": list(pieces) if body.return_token_strs else None,
        }
    )


async def _encode(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        chat = ChatRequest(
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=body.tools,
        )
        return await encode_chat(service, chat)
    text = body.prompt if body.prompt is not None else body.content
    assert text is not None
    encode = functools.partial(
        service.tokenizer.encode, text, add_special_tokens=body.add_special_tokens
    )
    return await service.encode(len(text), encode)


@router.post("/detokenize", **answers(Text))
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Tells the text of tokens."""
    service: Service = request.app.state.service
    service.check_ready()
    service.check_model(body.model)
    service.unknown_fields.check(body.model_extra)
    check_token_ids("tokens", body.tokens, service.engine.info)
    return json_response({"prompt": service.tokenizer.decode(body.tokens)})
