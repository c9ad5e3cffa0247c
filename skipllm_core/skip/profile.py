"""Skip profiles: what calibration found out about one model.

A profile is a YAML file made by `skipllm calibrate`. No torch here: the server process reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import yaml

from skipllm_core.errors import ProfileError
from skipllm_core.types import SkipPolicyName

SCHEMA_VERSION: Literal[3] = 3
DEFAULT_WARMUP_TOKENS = 25  # where the paper's ablation saturates
MEASURED_POLICIES = tuple(name for name in get_args(SkipPolicyName) if name != "never")

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Cosine = Annotated[float, msgspec.Meta(ge=-1, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Score = Annotated[float, msgspec.Meta(ge=0)]


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
    """What a policy costs at one ratio, measured on held-out answers of the full model.

    The ratio is the share of FFN weights that is not used, over the tokens decoded after the
    warm-up. It, agreement and KL(full || skipping), in nats per token, are taken where both models
    read the full one's text. So is the change of the perplexity, exp(mean negative log-likelihood)
    of that text: 0.1 is 10 % above the full model's.
    `weight_skip_ratio` has, by batch size, the share of FFN weight reads avoided by rows that skip
    independently of each other: what one token does without with probability p, B do with p ** B.
    """

    target_ratio: Share
    skipped_ffn_share: Share
    weight_skip_ratio: dict[int, Share]  # batch size -> ratio
    top1_agreement: Share
    kl: Annotated[float, msgspec.Meta(ge=0)]
    perplexity_change: Annotated[float, msgspec.Meta(ge=-1)]
    num_tokens: Count  # that it was measured on
    # The ratio where the model reads its own text under the policy, over a few hundred tokens; None
    # where it is known beforehand, or was not tried.
    free_ffn_share: Share | None = None


class FfnSkipPoint(SkipPoint, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`trigger_layers[l]` counts tokens that triggered at layer l; the others of `num_tokens`
    skipped nothing."""

    threshold: Cosine
    region: tuple[Count, Count]  # cold_start, cold_end
    trigger_layers: tuple[Count, ...]


class NeuronPoint(SkipPoint, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Thresholds by layer, before up and before down; see `skip.neurons`."""

    up_thresholds: tuple[Score, ...]
    down_thresholds: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What skipping costs, as a profile shows it."""

    top1_agreement: float
    kl: float


class SkipProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model's skippable regions, thresholds, and what each policy costs it.

    `model` is its identity for readers, `fingerprint` (of config and weights) the one that is
    checked. Points go from little skipping to much. Those of `ffn_skip` have the region that served
    their ratio best; `cold_start` and `cold_end` are for thresholds that come without a ratio.
    """

    schema_version: Literal[3] = SCHEMA_VERSION
    fingerprint: str
    model: dict[str, str | int]
    cold_start: Count
    cold_end: Count
    warmup_tokens: Count  # measured with, and the default of a server with this profile
    num_prompts: Count
    num_tokens: Count  # that the similarities are taken over
    ffn_skip: tuple[FfnSkipPoint, ...] = ()
    neurons: tuple[NeuronPoint, ...] = ()
    static: tuple[SkipPoint, ...] = ()
    random: tuple[SkipPoint, ...] = ()
    layer_drop: tuple[SkipPoint, ...] = ()
    early_exit: tuple[SkipPoint, ...] = ()
    similarity: tuple[LayerSimilarity, ...]

    def __post_init__(self) -> None:
        regions = [(self.cold_start, self.cold_end), *(point.region for point in self.ffn_skip)]
        if not all(0 <= start < end < self.num_layers for start, end in regions):
            raise ValueError("not so: 0 <= cold_start < cold_end < number of layers")
        for policy in MEASURED_POLICIES:
            points = self.points(policy)
            for before, after in pairwise(points):
                if not before.skipped_ffn_share < after.skipped_ffn_share:
                    raise ValueError(f"points of {policy} must go from a low ratio to a high one")
        for low, high in pairwise(self.ffn_skip):
            is_same_region = low.region == high.region
            if is_same_region and not low.threshold >= high.threshold:
                raise ValueError("points of one region must go from a high threshold to a low one")
        for point in self.neurons:
            if {len(point.up_thresholds), len(point.down_thresholds)} != {self.num_layers}:
                raise ValueError(f"points of neurons need {self.num_layers} thresholds, twice")

    @property
    def num_layers(self) -> int:
        return len(self.similarity)

    def points(self, policy: SkipPolicyName) -> tuple[SkipPoint, ...]:
        """What was measured of a policy; nothing of `never`."""
        found: tuple[SkipPoint, ...] = () if policy == "never" else getattr(self, policy)
        return found

    def max_ratio(self, policy: SkipPolicyName) -> float:
        """The largest ratio that was measured; 0 where none was."""
        points = self.points(policy)
        return max(points[-1].target_ratio, points[-1].skipped_ffn_share) if points else 0.0

    def ratio_at_agreement(self, policy: SkipPolicyName, least: float) -> float | None:
        """The largest measured ratio whose top-1 agreement is at least this; None: none is."""
        points = self.points(policy)
        return max((p.skipped_ffn_share for p in points if p.top1_agreement >= least), default=None)

    def expected(self, policy: SkipPolicyName, ratio: float) -> Expected:
        """What leaving out this share costs under a policy that was measured: linear between its
        points, of which the first is that nothing is lost at ratio 0, and on behind the last, which
        may fall short of its target."""
        points = self.points(policy)
        assert points, policy
        known = [(0.0, 1.0, 0.0), *((p.skipped_ffn_share, p.top1_agreement, p.kl) for p in points)]
        low, high = next(
            (pair for pair in pairwise(known) if ratio <= pair[1][0]), (known[-2], known[-1])
        )
        share = (ratio - low[0]) / (high[0] - low[0])
        agreement, kl = (a + share * (b - a) for a, b in zip(low[1:], high[1:], strict=True))
        return Expected(max(0.0, agreement), max(0.0, kl))

    def best_at(self, ratio: float, policies: Sequence[SkipPolicyName]) -> SkipPolicyName | None:
        """The policy that costs the least KL there; None: none of them goes so far."""
        reaching = [p for p in policies if self.points(p) and ratio <= self.max_ratio(p)]
        return min(reaching, key=lambda p: self.expected(p, ratio).kl, default=None)

    def best_at_agreement(
        self, least: float, policies: Sequence[SkipPolicyName]
    ) -> tuple[SkipPolicyName, float] | None:
        """The policy that leaves out the most, and how much; None: none agrees so often."""
        ratios = [(policy, self.ratio_at_agreement(policy, least)) for policy in policies]
        found = [(policy, ratio) for policy, ratio in ratios if ratio is not None]
        return max(found, key=lambda one: one[1], default=None)

    @property
    def widest_region(self) -> tuple[int, int]:
        """The one of most layers that was measured."""
        regions = [(self.cold_start, self.cold_end), *(point.region for point in self.ffn_skip)]
        return max(regions, key=lambda region: region[1] - region[0])

    def blocks_at(self, ratio: float) -> tuple[float, tuple[int, int]]:
        """(threshold, region) of `ffn_skip` that skip this share, between the measured points
        linearly; between points of different regions, whose thresholds do not mix, the nearer's.

        0 < ratio <= max_ratio. Ratios below the first point lie between it and threshold 1.
        """
        low_ratio, low_threshold, low_region = 0.0, 1.0, self.ffn_skip[0].region
        for point in self.ffn_skip:
            high_region = point.region
            if ratio <= point.skipped_ffn_share:
                share = (ratio - low_ratio) / (point.skipped_ffn_share - low_ratio)
                if low_region != high_region:
                    return (
                        (low_threshold, low_region)
                        if share < 0.5
                        else (point.threshold, high_region)
                    )
                return low_threshold + share * (point.threshold - low_threshold), low_region
            low_ratio, low_threshold, low_region = (
                point.skipped_ffn_share,
                point.threshold,
                high_region,
            )
        return low_threshold, low_region  # the last target, of which the measurement fell short

    def neurons_at(self, ratio: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The thresholds of `neurons` (before up, before down) that leave out this share, between
        the measured points linearly. 0 < ratio <= max_ratio; ratio 0 has thresholds of 0."""
        low_ratio = 0.0
        low_up = low_down = (0.0,) * self.num_layers
        for point in self.neurons:
            high_up, high_down = point.up_thresholds, point.down_thresholds
            if ratio <= point.skipped_ffn_share:
                share = (ratio - low_ratio) / (point.skipped_ffn_share - low_ratio)
                return _between(low_up, high_up, share), _between(low_down, high_down, share)
            low_ratio, low_up, low_down = point.skipped_ffn_share, high_up, high_down
        return low_up, low_down

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


def _between(low: Sequence[float], high: Sequence[float], share: float) -> tuple[float, ...]:
    return tuple(a + share * (b - a) for a, b in zip(low, high, strict=True))


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
