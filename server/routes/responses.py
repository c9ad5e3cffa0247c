"""POST /v1/responses, and what is stored of it. Each is a chat in OpenAI's newer form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from starlette.responses import Response

from server.errors import HTTPError, json_response
from server.openapi import answers
from server.protocol.items import Item
from server.protocol.responses import InputTokensRequest, ResponsesRequest
from server.protocol.schemas_responses import (
    DeletedResponse,
    InputItems,
    InputTokens,
    ResponseEvent,
    ResponseObject,
)
from server.protocol.validation import unsupported
from server.response_store import ResponseStore, StoredResponse
from server.responses.chat import to_chat
from server.responses.form import ResponsesForm
from server.routes.answering import answer, refuse_early, unless_disconnected
from server.routes.chat import begin_chat, encode_chat
from server.routes.strict import StrictRouter
from server.service import Service
from server.translation import in_the_clients_names
from skipllm_core.errors import ContextLengthError

router = StrictRouter()


@router.post("/v1/responses", **answers(ResponseObject, stream=ResponseEvent))
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answers an input, in one or, with `stream`, as it is generated."""
    service: Service = request.app.state.service
    store = service.responses
    before, items = _conversation(store, body)
    chat, names = to_chat(body, before, items)

    def keep(response: dict[str, Any]) -> bool:
        return store.keep(response, [*before, *items])

    is_kept = store.is_on and body.store is not False
    with _in_the_clients_names(names):
        _, generation = await begin_chat(service, request, chat)
        form = ResponsesForm(service, body, names, generation, keep if is_kept else None)
        return await answer(request, generation, form, stream=bool(body.stream))


@router.post("/v1/responses/input_tokens", **answers(InputTokens))
async def count_input_tokens(body: InputTokensRequest, request: Request) -> Response:
    """Counts the tokens of an input as the model would be given it."""
    service: Service = request.app.state.service
    chat, names = to_chat(body, *_conversation(service.responses, body))
    with _in_the_clients_names(names):
        refuse_early(service, chat)
        token_ids = await unless_disconnected(request.receive, encode_chat(service, chat))
    return json_response({"object": "response.input_tokens", "input_tokens": len(token_ids)})


@router.get("/v1/responses/{response_id}", **answers(ResponseObject, errors=(400, 404)))
async def show_response(response_id: str, request: Request, stream: bool | None = None) -> Response:
    if stream:  # of answers in the background, of which there are none
        raise unsupported("stream")
    return json_response(_stored(request, response_id).response)


@router.get("/v1/responses/{response_id}/input_items", **answers(InputItems, errors=(400, 404)))
async def list_input_items(
    response_id: str,
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What a stored response was given, earlier turns included; the last comes first."""
    items = _stored(request, response_id).input_items
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise _not_found("Item", after, param="after")
        items = items[places[0] + 1 :]
    page = items[:limit]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


@router.delete("/v1/responses/{response_id}", **answers(DeletedResponse, errors=(404,)))
async def delete_response(response_id: str, request: Request) -> Response:
    """Forgets a stored response."""
    _stored(request, response_id)
    request.app.state.service.responses.delete(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel", **answers(ResponseObject))
async def cancel_response(response_id: str, request: Request) -> Response:
    """Refused: only responses in the background could be cancelled, and there are none."""
    _stored(request, response_id)
    raise HTTPError(400, "Cannot cancel a synchronous response.")


@contextmanager
def _in_the_clients_names(names: Mapping[str, str]) -> Iterator[None]:
    with in_the_clients_names(names):
        try:
            yield
        except ContextLengthError as error:
            message = error.message_for("input")
            raise HTTPError(400, message, param="input", code=error.code) from None


def _conversation(
    store: ResponseStore, body: InputTokensRequest
) -> tuple[Sequence[Item], list[Item]]:
    """The items before the request's own, and its own, with what they refer to in their place."""
    before: Sequence[Item] = ()
    if body.previous_response_id is not None:
        previous = store.get(body.previous_response_id)
        if previous is None:
            raise HTTPError(
                400,
                f"Previous response with id '{body.previous_response_id}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        before = previous.conversation
    return before, [_referred(store, item) for item in body.input]


def _referred(store: ResponseStore, item: Item) -> Item:
    if item["type"] != "item_reference":
        return item
    found = store.output_item(item["id"])
    if found is None:
        raise _not_found("Item", item["id"], param="input")
    return found


def _stored(request: Request, response_id: str) -> StoredResponse:
    store: ResponseStore = request.app.state.service.responses
    stored = store.get(response_id)
    if stored is None:
        raise _not_found("Response", response_id)
    return stored


def _not_found(thing: str, its_id: str, param: str | None = None) -> HTTPError:
    message = f"{thing} with id '{its_id[:200]}' not found."
    return HTTPError(404, message, param=param)
