"""A skip profile of made-up numbers."""

from __future__ import annotations

from typing import Any

from skipllm_core.skip.profile import (
    FfnSkipPoint,
    LayerSimilarity,
    NeuronPoint,
    SkipPoint,
    SkipProfile,
)


def layer(mean: float = 0.9, block_influence: float = 0.2) -> LayerSimilarity:
    return LayerSimilarity(
        mean=mean, p05=0.8, p25=0.85, p50=0.9, p75=0.92, p95=0.99, block_influence=block_influence
    )


def point(
    ratio: float, threshold: float, measured: float | None = None, **more: Any
) -> FfnSkipPoint:
    settings: dict[str, Any] = {
        "region": (1, 5),
        "threshold": threshold,
        "trigger_layers": (0, 3, 2, 0, 0, 0),
    }
    return FfnSkipPoint(**_measured(ratio, measured) | settings | more)


def neuron_point(
    ratio: float, *, up: float = 0.1, down: float = 0.2, num_layers: int = 6, **more: Any
) -> NeuronPoint:
    thresholds = {"up_thresholds": (up,) * num_layers, "down_thresholds": (down,) * num_layers}
    return NeuronPoint(**_measured(ratio) | thresholds | more)


def baseline_point(ratio: float, **more: Any) -> SkipPoint:
    return SkipPoint(**_measured(ratio) | more)


def _measured(ratio: float, measured: float | None = None) -> dict[str, Any]:
    measured = ratio if measured is None else measured
    return {
        "target_ratio": ratio,
        "skipped_ffn_share": measured,
        "weight_skip_ratio": {1: measured, 4: measured / 2},
        "top1_agreement": 0.98,
        "kl": 0.01,
        "perplexity_change": 0.02,
        "num_tokens": 7,
    }


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
