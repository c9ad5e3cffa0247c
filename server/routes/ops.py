"""What operators and their tools ask: health, readiness, metrics, version, what is running."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from server.errors import json_response
from server.openapi import answers
from server.protocol.schemas import Health, ServerInfo, Status, Version
from server.routes.strict import StrictRouter
from server.service import Service
from skipllm_core.skip.profile import MEASURED_POLICIES, FfnSkipPoint, SkipPoint, SkipProfile
from skipllm_core.skip.resolve import choose_skip

router = StrictRouter()


@router.get("/health", **answers(Health, red=Health))
async def health(request: Request) -> Response:
    """Tells with 200 that the engine is ready; draining is no illness."""
    found = _service(request).engine.health()
    status = 200 if found.state == "ready" else 503
    return json_response({"status": found.state, "detail": found.detail}, status)


@router.get("/ready", **answers(Status, red=Status))
async def ready(request: Request) -> Response:
    """Tells with 200 that new requests are welcome: not while loading, restarting or draining."""
    service = _service(request)
    state = service.engine.health().state
    status = "draining" if service.lifecycle.is_draining else state
    return json_response({"status": status}, 200 if status == "ready" else 503)


@router.get("/live", **answers(Status))
async def live() -> Response:
    """Tells with 200 that the process answers at all."""
    return json_response({"status": "alive"})


@router.get("/metrics", **answers(None, media_type="text/plain"))
async def metrics(request: Request) -> Response:
    """The metrics, in Prometheus' text format."""
    content = _service(request).metrics.render()
    return Response(content, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


@router.get("/version", **answers(Version))
async def version(request: Request) -> Response:
    """The server's version."""
    return json_response({"version": _service(request).version})


@router.get("/server_info", **answers(ServerInfo, errors=(503,)))
async def server_info(request: Request) -> Response:
    """The model, its limits, the skip policy and the skip profile."""
    service = _service(request)
    service.check_ready()
    return json_response(
        {
            "version": service.version,
            "model": service.model_name,
            "engine": dataclasses.asdict(service.engine.info),
            "sampling_defaults": service.sampling_defaults.model_dump(),
            "skip": _skipping(service),
            "tools": service.chat_style.summary(),
            "num_running_requests": service.lifecycle.num_running,
            "num_unknown_fields_ignored": service.unknown_fields.num_ignored,
        }
    )


def _skipping(service: Service) -> dict[str, Any]:
    """The defaults as they were set, what a request gets that wishes nothing, and what is known of
    the policies."""
    profile = service.skip_profile
    runnable = service.engine.info.skip_policies
    choice = choose_skip(service.skip_defaults, profile, None, runnable)
    return {
        "defaults": dataclasses.asdict(service.skip_defaults),
        "chosen": dataclasses.asdict(choice),
        "profile": None if profile is None else _summary(profile),
    }


def _summary(profile: SkipProfile) -> dict[str, Any]:
    return {
        "model": profile.model,
        "cold_start": profile.cold_start,
        "cold_end": profile.cold_end,
        "warmup_tokens": profile.warmup_tokens,
        "policies": {
            policy: {
                "max_ratio": profile.max_ratio(policy),
                "points": [_point(point) for point in points],
            }
            for policy in MEASURED_POLICIES
            if (points := profile.points(policy))
        },
    }


def _point(point: SkipPoint) -> dict[str, Any]:
    """What it costs; and of thresholds, where there is one for all layers."""
    of_ffn_skip = {}
    if isinstance(point, FfnSkipPoint):
        of_ffn_skip = {"threshold": point.threshold, "region": point.region}
    return {
        "skipped_ffn_share": point.skipped_ffn_share,
        "top1_agreement": point.top1_agreement,
        "kl": point.kl,
        "perplexity_change": point.perplexity_change,
        "weight_skip_ratio": {str(batch): r for batch, r in point.weight_skip_ratio.items()},
        **of_ffn_skip,
    }


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
