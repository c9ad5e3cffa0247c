"""GET /v1/models and /v1/models/{id}: one model, under each of its names."""

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
    service: Service = request.app.state.service
    names = (service.model_name, *service.model_aliases)
    return json_response({"object": "list", "data": [_card(service, name) for name in names]})


@router.get("/v1/models/{model_name:path}", **answers(ModelCard, errors=(404, 503)))
async def show_model(model_name: str, request: Request) -> Response:
    """Tells about the model of one name."""
    service: Service = request.app.state.service
    service.check_model(model_name)
    return json_response(_card(service, model_name))


def _card(service: Service, name: str) -> dict[str, Any]:
    service.check_ready()
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "skipllm",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.engine.info.max_model_len,
    }
