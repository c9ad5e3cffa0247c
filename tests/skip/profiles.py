"""A skip profile of made-up numbers."""

from __future__ import annotations

from typing import Any

from skipllm_core.skip.profile import FfnSkipPoint, LayerSimilarity, SkipProfile


def layer(mean: float = 0.9, block_influence: float = 0.2) -> LayerSimilarity:
    return LayerSimilarity(
        mean=mean, p05=0.8, p25=0.85, p50=0.9, p75=0.92, p95=0.99, block_influence=block_influence
    )


def point(
    ratio: float, threshold: float, measured: float | None = None, **more: Any
) -> FfnSkipPoint:
    measured = ratio if measured is None else measured
    settings: dict[str, Any] = {
        "target_ratio": ratio,
        "region": (1, 5),
        "threshold": threshold,
        "skipped_ffn_share": measured,
        "weight_skip_ratio": {1: measured, 4: measured / 2},
        "top1_agreement": 0.98,
        "kl": 0.01,
        "perplexity_change": 0.02,
        "trigger_layers": (0, 3, 2, 0, 0, 0),
        "num_tokens": 7,
    }
    return FfnSkipPoint(**settings | more)


def profile(*points: FfnSkipPoint, num_layers: int = 6, **more: Any) -> SkipProfile:
    settings: dict[str, Any] = {
        "fingerprint": "0123456789abcdef" * 4,
        "model": {"model_type": "llama", "num_layers": num_layers},
        "cold_start": 1,
        "cold_end": num_layers - 1,
        "warmup_tokens": 3,
        "num_prompts": 10,
        "num_tokens": 200,
        "ffn_skip": points,
        "similarity": (layer(),) * num_layers,
    }
    return SkipProfile(**settings | more)
