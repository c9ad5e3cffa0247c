"""Skip profiles: what calibration found out about one model, and requests' wishes made numbers.

A profile is a YAML file made by `skipllm calibrate`. No torch here: the server process reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from skipllm_core.errors import InvalidRequestError, ProfileError
from skipllm_core.types import SkipParams, SkipPolicyName

SCHEMA_VERSION: Literal[1] = 1
DEFAULT_WARMUP_TOKENS = 25  # where the paper's ablation saturates

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Cosine = Annotated[float, msgspec.Meta(ge=-1, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class LayerSimilarity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """cos(h, h + FFN(h)) of one layer over the tokens that the full model generated."""

    mean: Cosine
    p05: Cosine
    p25: Cosine
    p50: Cosine
    p75: Cosine
    p95: Cosine


class SkipPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One threshold and what it does, measured on held-out prompts.

    The ratio is that of free generation, over the tokens decoded after the warm-up; agreement and
    KL(full || skipping), in nats per token, are those of the next-token distributions when both
    read the full model's text. `trigger_layers[l]` counts tokens that triggered at layer l; the
    rest of `num_tokens` skipped nothing.
    """

    target_ratio: Share
    threshold: Cosine
    region: tuple[Count, Count] | None = None  # cold_start, cold_end, if not the profile's own
    token_skip_ratio: Share
    top1_agreement: Share
    kl: Annotated[float, msgspec.Meta(ge=0)]
    trigger_layers: tuple[Count, ...]
    num_tokens: Count


class SkipProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model's skippable region and thresholds. Points beyond the region's reach have a wider one
    of their own. `model` is its identity for readers, `fingerprint` (of config and weights) the one
    that is checked. Points go from little skipping to much."""

    schema_version: Literal[1] = SCHEMA_VERSION
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
        if not 0 < self.cold_start < self.cold_end < self.num_layers:
            raise ValueError("not so: 0 < cold_start < cold_end < number of layers")
        for start, end in map(self.region_at, self.points):
            if not 0 < start <= self.cold_start < self.cold_end <= end < self.num_layers:
                raise ValueError("a point's region must hold the profile's own")
        for before, after in zip(self.points, self.points[1:], strict=False):
            if not before.token_skip_ratio < after.token_skip_ratio:
                raise ValueError("points must go from a low ratio to a high one")
            is_same_region = self.region_at(before) == self.region_at(after)
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

    def region_at(self, point: SkipPoint) -> tuple[int, int]:
        """(cold_start, cold_end) of one of the points."""
        return point.region or (self.cold_start, self.cold_end)

    def at_ratio(self, ratio: float) -> tuple[float, tuple[int, int]]:
        """(threshold, region) that skip this share of FFN blocks, between the measured points
        linearly; between points of different regions, whose thresholds do not mix, the nearer's.

        0 < ratio <= max_ratio. Ratios below the first point lie between it and threshold 1.
        """
        assert 0 < ratio <= self.max_ratio, "the caller has compared the ratio with max_ratio"
        low_ratio, low_threshold, low_region = 0.0, 1.0, self.region_at(self.points[0])
        for point in self.points:
            high_region = self.region_at(point)
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
            return msgspec.convert(data, cls)
        except OSError as error:
            raise ProfileError(f"cannot read skip profile {path}: {error.strerror}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ProfileError(f"skip profile {path} is malformed: {reason}") from None


def _refuse_non_finite(data: object) -> None:
    """NaN passes every comparison that bounds a number."""
    if isinstance(data, float) and not math.isfinite(data):
        raise ValueError("a number is not finite")
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            _refuse_non_finite(item)


# From wishes to numbers --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipDefaults:
    """The server's settings, used where a request says nothing. Ratio or threshold, not both."""

    policy: SkipPolicyName = "never"
    ratio: float | None = None
    threshold: float | None = None
    warmup_tokens: int | None = None  # None: the profile's
    max_skips: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipOptions:
    """What one request wishes; None: the server's default."""

    policy: Literal["off", "ffn_skip"] | None = None
    ratio: float | None = None
    threshold: float | None = None
    warmup_tokens: int | None = None
    max_skips: int | None = None
    trace: bool | None = None


def resolve_skip(
    defaults: SkipDefaults, profile: SkipProfile | None, options: SkipOptions | None
) -> SkipParams:
    """One sequence's settings. Raises InvalidRequestError where the wish cannot be met.

    A request that names a ratio, a threshold or the policy `ffn_skip` skips even where the server's
    default is not to. Ratio 0 is the policy `never`.
    """
    wish = options or SkipOptions()
    _check(wish)
    trace = bool(wish.trace)
    names_amount = wish.ratio is not None or wish.threshold is not None
    ratio = wish.ratio if names_amount else defaults.ratio
    threshold = wish.threshold if names_amount else defaults.threshold
    is_wanted = (
        wish.policy == "ffn_skip"
        if wish.policy is not None
        else names_amount or defaults.policy == "ffn_skip"
    )
    if not is_wanted or (threshold is None and ratio == 0):
        return SkipParams(policy="never", trace=trace)
    if profile is None:
        raise InvalidRequestError(
            "This model has no skip profile, so FFN skipping is not available. "
            "`skipllm calibrate` makes one.",
            param="skip",
        )
    region = (profile.cold_start, profile.cold_end)
    if threshold is None:
        threshold, region = _at_ratio(profile, ratio)
    return SkipParams(
        policy="ffn_skip",
        threshold=threshold,
        warmup_tokens=_first(wish.warmup_tokens, defaults.warmup_tokens, profile.warmup_tokens),
        cold_start=region[0],
        cold_end=region[1],
        max_skips=wish.max_skips if wish.max_skips is not None else defaults.max_skips,
        trace=trace,
    )


def _check(wish: SkipOptions) -> None:
    """NaN fails too: it compares false with everything."""
    for name, share in (("ratio", wish.ratio), ("threshold", wish.threshold)):
        if share is not None and not 0 <= share <= 1:
            raise InvalidRequestError(f"skip.{name} must be within 0 and 1.", param=f"skip.{name}")
    for name, count in (("warmup_tokens", wish.warmup_tokens), ("max_skips", wish.max_skips)):
        if count is not None and count < 0:
            raise InvalidRequestError(f"skip.{name} must not be negative.", param=f"skip.{name}")
    if wish.ratio is not None and wish.threshold is not None:
        raise InvalidRequestError(
            "Give either skip.ratio or skip.threshold, not both.", param="skip.threshold"
        )


def _at_ratio(profile: SkipProfile, ratio: float | None) -> tuple[float, tuple[int, int]]:
    if ratio is None:
        raise InvalidRequestError(
            "How much to skip is not said: give skip.ratio or skip.threshold.", param="skip.ratio"
        )
    if ratio > profile.max_ratio:
        raise InvalidRequestError(
            f"skip.ratio {ratio:g} is out of reach: the skip profile of this model goes up to "
            f"{profile.max_ratio:.2f}.",
            param="skip.ratio",
        )
    return profile.at_ratio(ratio)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
