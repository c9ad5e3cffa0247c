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
    token_skip_ratio: Share
    top1_agreement: Share
    kl: Annotated[float, msgspec.Meta(ge=0)]
    trigger_layers: tuple[Count, ...]
    num_tokens: Count


class SkipProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model's skippable region and thresholds. `model` is its identity for readers, `fingerprint`
    (of config and weights) the one that is checked. Points go from little skipping to much."""

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
        for before, after in zip(self.points, self.points[1:], strict=False):
            if not (
                before.threshold >= after.threshold
                and before.token_skip_ratio < after.token_skip_ratio
            ):
                raise ValueError("points must go from high threshold, low ratio to the opposite")

    @property
    def num_layers(self) -> int:
        return len(self.similarity)

    @property
    def max_ratio(self) -> float:
        """The largest ratio that may be asked for; 0 where calibration found none."""
        if not self.points:
            return 0.0
        return max(self.points[-1].target_ratio, self.points[-1].token_skip_ratio)

    def threshold_for(self, ratio: float) -> float:
        """The threshold that skips this share of FFN blocks, between the measured points linearly.

        0 < ratio <= max_ratio. Ratios below the first point lie between it and threshold 1.
        """
        assert 0 < ratio <= self.max_ratio, "the caller has compared the ratio with max_ratio"
        low_ratio, low_threshold = 0.0, 1.0
        for point in self.points:
            if ratio <= point.token_skip_ratio:
                share = (ratio - low_ratio) / (point.token_skip_ratio - low_ratio)
                return low_threshold + share * (point.threshold - low_threshold)
            low_ratio, low_threshold = point.token_skip_ratio, point.threshold
        return low_threshold  # the last target, of which the measurement fell short

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
    return SkipParams(
        policy="ffn_skip",
        threshold=threshold if threshold is not None else _threshold(profile, ratio),
        warmup_tokens=_first(wish.warmup_tokens, defaults.warmup_tokens, profile.warmup_tokens),
        cold_start=profile.cold_start,
        cold_end=profile.cold_end,
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


def _threshold(profile: SkipProfile, ratio: float | None) -> float:
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
    return profile.threshold_for(ratio)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
