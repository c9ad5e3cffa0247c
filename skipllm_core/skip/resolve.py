"""Wishes made numbers: the server's settings and a request's `skip` object into `SkipParams`.

No torch here: the server process does this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from skipllm_core.errors import InvalidRequestError
from skipllm_core.skip.baselines import best_layers, exit_range
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.types import SkipParams, SkipPolicyName

# The policies that each of these numbers means something to.
_ADAPTIVE: tuple[SkipPolicyName, ...] = ("ffn_skip",)
_NEED_POINTS: tuple[SkipPolicyName, ...] = ("ffn_skip", "neurons")  # have measured thresholds
_OF_POLICIES: dict[str, tuple[SkipPolicyName, ...]] = {
    "threshold": _ADAPTIVE,
    "max_skips": _ADAPTIVE,
    "warmup_tokens": ("ffn_skip", "neurons", "static", "random"),
    "budget_tokens": ("early_exit",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipDefaults:
    """The server's settings, used where a request says nothing. Ratio or threshold, not both."""

    policy: SkipPolicyName = "never"
    ratio: float | None = None
    threshold: float | None = None
    warmup_tokens: int | None = None  # None: the profile's
    max_skips: int | None = None
    prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipOptions:
    """What one request wishes; None: the server's default."""

    policy: Literal["off", SkipPolicyName] | None = None
    ratio: float | None = None
    threshold: float | None = None
    warmup_tokens: int | None = None
    max_skips: int | None = None
    budget_tokens: int | None = None
    trace: bool | None = None
    prompt: bool | None = None


def resolve_skip(
    defaults: SkipDefaults, profile: SkipProfile | None, options: SkipOptions | None
) -> SkipParams:
    """One sequence's settings. Raises InvalidRequestError where the wish cannot be met.

    A request that names an amount (a ratio or a threshold) skips even where the server's default is
    not to. Ratio 0 is the policy `never`.
    """
    wish = options or SkipOptions()
    _check_ranges(wish)
    trace = bool(wish.trace)
    policy = _policy(defaults, wish)
    names_amount = wish.ratio is not None or wish.threshold is not None
    ratio = wish.ratio if names_amount else defaults.ratio
    threshold = wish.threshold if names_amount else defaults.threshold
    if policy == "never" or (threshold is None and ratio == 0):
        return SkipParams(policy="never", trace=trace)
    for name, policies in _OF_POLICIES.items():
        if getattr(wish, name) is not None and policy not in policies:
            raise InvalidRequestError(
                f"skip.{name} means nothing to the policy {policy}.", param=f"skip.{name}"
            )
    if profile is None:
        raise InvalidRequestError(
            "This model has no skip profile, so FFN skipping is not available. "
            "`skipllm calibrate` makes one.",
            param="skip",
        )
    if policy in _NEED_POINTS and not profile.points(policy):
        raise InvalidRequestError(
            f"The skip profile of this model has no measurements of the policy {policy}. "
            "`skipllm calibrate` makes them.",
            param="skip.policy",
        )
    amount = _amount(policy, profile, ratio, threshold)
    if policy in _OF_POLICIES["warmup_tokens"]:
        warmup = _first(wish.warmup_tokens, defaults.warmup_tokens, profile.warmup_tokens)
        amount = replace(amount, warmup_tokens=warmup)
    if policy == "ffn_skip":
        max_skips = wish.max_skips if wish.max_skips is not None else defaults.max_skips
        amount = replace(amount, max_skips=max_skips)
    prompt = defaults.prompt if wish.prompt is None else wish.prompt
    return replace(amount, budget_tokens=wish.budget_tokens, trace=trace, prompt=prompt)


def _policy(defaults: SkipDefaults, wish: SkipOptions) -> SkipPolicyName:
    if wish.policy is not None:
        return "never" if wish.policy == "off" else wish.policy
    if defaults.policy == "never" and (wish.ratio is not None or wish.threshold is not None):
        return "ffn_skip"
    return defaults.policy


def _amount(
    policy: SkipPolicyName, profile: SkipProfile, ratio: float | None, threshold: float | None
) -> SkipParams:
    """How much is skipped, in the policy's own numbers."""
    num_layers = profile.num_layers
    region = (profile.cold_start, profile.cold_end)
    if policy == "ffn_skip":
        if threshold is None:
            threshold, region = profile.blocks_at(_within(ratio, profile.max_ratio(policy)))
        start, end = region
        return SkipParams(policy=policy, threshold=threshold, cold_start=start, cold_end=end)
    if policy == "neurons":
        up, down = profile.neurons_at(_within(ratio, profile.max_ratio(policy)))
        return SkipParams(policy=policy, up_thresholds=up, down_thresholds=down)
    if policy == "static":
        # Of the middle: the first and the last layer are no choice, as under `ffn_skip`.
        ratio = _within(ratio, (num_layers - 2) / num_layers)
        means = [layer.mean for layer in profile.similarity]
        return SkipParams(policy=policy, layers=best_layers(means, ratio, range(1, num_layers - 1)))
    if policy == "random":
        start, end = profile.widest_region
        start += 1  # a region's first layer is watched, never skipped
        ratio = _within(ratio, (end - start) / num_layers)
        return SkipParams(
            policy=policy,
            probability=min(1.0, ratio * num_layers / (end - start)),
            cold_start=start,
            cold_end=end,
        )
    ratio = _within(ratio, (num_layers - 1) / num_layers)
    if policy == "layer_drop":
        influences = [-layer.block_influence for layer in profile.similarity]
        dropped = best_layers(influences, ratio, range(num_layers))
        return SkipParams(policy=policy, layers=dropped, warmup_tokens=0)
    first, last = exit_range(ratio, num_layers)
    return SkipParams(
        policy=policy, first_exit=first, cold_start=last, cold_end=num_layers, warmup_tokens=0
    )


def _within(ratio: float | None, most: float) -> float:
    if ratio is None:
        raise InvalidRequestError(
            "How much to skip is not said: give skip.ratio or skip.threshold.", param="skip.ratio"
        )
    if ratio > most:
        raise InvalidRequestError(
            f"skip.ratio {ratio:g} is out of reach: the skip profile of this model goes up to "
            f"{most:.2f}.",
            param="skip.ratio",
        )
    return ratio


def _check_ranges(wish: SkipOptions) -> None:
    """NaN fails too: it compares false with everything."""
    for name, least, value in (("ratio", 0, wish.ratio), ("threshold", -1, wish.threshold)):
        if value is not None and not least <= value <= 1:
            message = f"skip.{name} must be within {least} and 1."
            raise InvalidRequestError(message, param=f"skip.{name}")
    for name, count in (("warmup_tokens", wish.warmup_tokens), ("max_skips", wish.max_skips)):
        if count is not None and count < 0:
            raise InvalidRequestError(f"skip.{name} must not be negative.", param=f"skip.{name}")
    if wish.budget_tokens is not None and wish.budget_tokens < 1:
        raise InvalidRequestError(
            "skip.budget_tokens must be at least 1.", param="skip.budget_tokens"
        )
    if wish.ratio is not None and wish.threshold is not None:
        raise InvalidRequestError(
            "Give either skip.ratio or skip.threshold, not both.", param="skip.threshold"
        )


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
