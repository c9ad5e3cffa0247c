"""Skip profiles: what calibration found out about one model.

A profile is a YAML file made by `skipllm calibrate`. No torch here: the server process reads it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from skipllm_core.errors import ProfileError

SCHEMA_VERSION: Literal[2] = 2
DEFAULT_WARMUP_TOKENS = 25  # where the paper's ablation saturates

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Cosine = Annotated[float, msgspec.Meta(ge=-1, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class LayerSimilarity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """cos(h, h + FFN(h)) of one layer over the tokens that the full model generated, and the
    layer's Block Influence over the same tokens: 1 - mean cos(layer in, layer out) (ShortGPT, arXiv
    2403.03853)."""

    mean: Cosine
    p05: Cosine
    p25: Cosine
    p50: Cosine
    p75: Cosine
    p95: Cosine
    block_influence: Annotated[float, msgspec.Meta(ge=0, le=2)]


class SkipPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One threshold and what it does, measured on held-out prompts.

    The ratio is that of free generation, over the tokens decoded after the warm-up; agreement and
    KL(full || skipping), in nats per token, are those of the next-token distributions when both
    read the full model's text. So is the change of the perplexity, exp(mean negative
    log-likelihood) of that text: 0.1 is 10 % above the full model's. `trigger_layers[l]` counts
    tokens that triggered at layer l; the rest of `num_tokens` skipped nothing. `weight_skip_ratio`
    has, by batch size, the share of FFN weight reads avoided by rows that skip independently of
    each other: of layer l, P(a token skips l) ** batch.
    """

    target_ratio: Share
    threshold: Cosine
    region: tuple[Count, Count]  # cold_start, cold_end
    token_skip_ratio: Share
    weight_skip_ratio: dict[int, Share]  # batch size -> ratio
    top1_agreement: Share
    kl: Annotated[float, msgspec.Meta(ge=0)]
    perplexity_change: Annotated[float, msgspec.Meta(ge=-1)]
    trigger_layers: tuple[Count, ...]
    num_tokens: Count


class SkipProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model's skippable regions and thresholds. Each point has the region that served its ratio
    best; `cold_start` and `cold_end` are for thresholds that come without a ratio. `model` is its
    identity for readers, `fingerprint` (of config and weights) the one that is checked. Points go
    from little skipping to much."""

    schema_version: Literal[2] = SCHEMA_VERSION
    fingerprint: str
    model: dict[str, str | int]
    cold_start: Count
    cold_end: Count
    warmup_tokens: Count  # measured with, and the default of a server with this profile
    num_prompts: Count
    num_tokens: Count  # that the similarities are taken over
    points: tuple[SkipPoint, ...]
    similarity: tuple[LayerSimilarity, ...]

    def __post_init__(self) -> None:
        regions = [(self.cold_start, self.cold_end), *(point.region for point in self.points)]
        if not all(0 <= start < end < self.num_layers for start, end in regions):
            raise ValueError("not so: 0 <= cold_start < cold_end < number of layers")
        for before, after in zip(self.points, self.points[1:], strict=False):
            if not before.token_skip_ratio < after.token_skip_ratio:
                raise ValueError("points must go from a low ratio to a high one")
            is_same_region = before.region == after.region
            if is_same_region and not before.threshold >= after.threshold:
                raise ValueError("points of one region must go from a high threshold to a low one")

    @property
    def num_layers(self) -> int:
        return len(self.similarity)

    @property
    def max_ratio(self) -> float:
        """The largest ratio that may be asked for; 0 where calibration found none."""
        if not self.points:
            return 0.0
        return max(self.points[-1].target_ratio, self.points[-1].token_skip_ratio)

    def ratio_at_agreement(self, least: float) -> float | None:
        """The largest measured ratio whose top-1 agreement is at least this; None: none is."""
        ratios = [p.token_skip_ratio for p in self.points if p.top1_agreement >= least]
        return max(ratios, default=None)

    @property
    def widest_region(self) -> tuple[int, int]:
        """The one of most layers that was measured."""
        regions = [(self.cold_start, self.cold_end), *(point.region for point in self.points)]
        return max(regions, key=lambda region: region[1] - region[0])

    def at_ratio(self, ratio: float) -> tuple[float, tuple[int, int]]:
        """(threshold, region) that skip this share of FFN blocks, between the measured points
        linearly; between points of different regions, whose thresholds do not mix, the nearer's.

        0 < ratio <= max_ratio. Ratios below the first point lie between it and threshold 1.
        """
        assert 0 < ratio <= self.max_ratio, "the caller has compared the ratio with max_ratio"
        low_ratio, low_threshold, low_region = 0.0, 1.0, self.points[0].region
        for point in self.points:
            high_region = point.region
            if ratio <= point.token_skip_ratio:
                share = (ratio - low_ratio) / (point.token_skip_ratio - low_ratio)
                if low_region != high_region:
                    return (
                        (low_threshold, low_region)
                        if share < 0.5
                        else (point.threshold, high_region)
                    )
                return low_threshold + share * (point.threshold - low_threshold), low_region
            low_ratio, low_threshold, low_region = (
                point.token_skip_ratio,
                point.threshold,
                high_region,
            )
        return low_threshold, low_region  # the last target, of which the measurement fell short

    def check_model(self, fingerprint: str) -> None:
        """Raises ProfileError unless the profile was made for this very model."""
        if fingerprint != self.fingerprint:
            raise ProfileError(
                f"the skip profile is of another model (fingerprint {self.fingerprint[:12]}, this "
                f"one has {fingerprint[:12]}); make one with `skipllm calibrate`"
            )

    def save(self, path: Path) -> None:
        text = yaml.safe_dump(
            msgspec.to_builtins(self), sort_keys=False, default_flow_style=None, width=100
        )
        path.write_text(f"# Made by `skipllm calibrate`.\n{text}", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SkipProfile:
        """Raises ProfileError with one line that names the file and the first fault."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            _refuse_non_finite(data)
            _refuse_other_schema(data)
            return msgspec.convert(data, cls)
        except OSError as error:
            raise ProfileError(f"cannot read skip profile {path}: {error.strerror}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ProfileError(f"skip profile {path} is malformed: {reason}") from None


def _refuse_other_schema(data: object) -> None:
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise ValueError(
            f"its schema is version {version}, this skipllm reads version {SCHEMA_VERSION}: run "
            "`skipllm calibrate` again"
        )


def _refuse_non_finite(data: object) -> None:
    """NaN passes every comparison that bounds a number."""
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError("a number is not finite")
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            _refuse_non_finite(item)
