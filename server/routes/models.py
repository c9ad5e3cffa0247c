"""GET /v1/models and /v1/models/{id}: one model, under its served name."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.responses import Response

from server.errors import json_response
from server.openapi import answers
from server.protocol.schemas import ModelCard, ModelList
from server.routes.strict import StrictRouter
from server.service import Service

router = StrictRouter()


@router.get("/v1/models", **answers(ModelList, errors=(503,)))
async def list_models(request: Request) -> Response:
    """Lists the model, under each of its names."""
    return json_response({"object": "list", "data": [_card(request.app.state.service)]})


@router.get("/v1/models/{model_name:path}", **answers(ModelCard, errors=(404, 503)))
async def show_model(model_name: str, request: Request) -> Response:
    """Tells about the model of one name."""
    service: Service = request.app.state.service
    service.check_model(model_name)
    return json_response(_card(service))


def _card(service: Service) -> dict[str, Any]:
    service.check_ready()
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "skipllm",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.engine.info.max_model_len,
    }
