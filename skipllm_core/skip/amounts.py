"""How much of a policy: a share of the FFN weights, in the numbers that the policy works with.

No torch here: the server process does this.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipllm_core.skip.baselines import best_layers, exit_range
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.types import SkipParams, SkipPolicyName


@dataclass(frozen=True, slots=True)
class SkipChoice:
    """A policy that was named or chosen, and how much it is to leave out: a share of the FFN
    weights, or what a threshold leads to."""

    policy: SkipPolicyName = "never"
    ratio: float = 0.0
    threshold: float | None = None


def max_ratio(policy: SkipPolicyName, profile: SkipProfile) -> float:
    """The largest ratio that a policy can be asked for."""
    num_layers = profile.num_layers
    match policy:
        case "static":  # the first and the last layer are no choice, as under `ffn_skip`
            return (num_layers - 2) / num_layers
        case "random":
            start, end = _random_region(profile)
            return (end - start) / num_layers
        case "layer_drop" | "early_exit":
            return (num_layers - 1) / num_layers
        case _:
            return profile.max_ratio(policy)


def _random_region(profile: SkipProfile) -> tuple[int, int]:
    start, end = profile.widest_region
    return start + 1, end  # a region's first layer is watched, never skipped


def to_params(choice: SkipChoice, profile: SkipProfile) -> SkipParams:
    """How much is skipped, in the policy's own numbers."""
    policy, ratio, num_layers = choice.policy, choice.ratio, profile.num_layers
    match policy:
        case "ffn_skip":
            threshold, region = choice.threshold, (profile.cold_start, profile.cold_end)
            if threshold is None:
                threshold, region = profile.blocks_at(ratio)
            start, end = region
            return SkipParams(policy=policy, threshold=threshold, cold_start=start, cold_end=end)
        case "neurons":
            up, down = profile.neurons_at(ratio)
            return SkipParams(policy=policy, up_thresholds=up, down_thresholds=down)
        case "static":
            means = [layer.mean for layer in profile.similarity]
            layers = best_layers(means, ratio, range(1, num_layers - 1))
            return SkipParams(policy=policy, layers=layers)
        case "random":
            start, end = _random_region(profile)
            return SkipParams(
                policy=policy,
                probability=min(1.0, ratio * num_layers / (end - start)),
                cold_start=start,
                cold_end=end,
            )
        case "layer_drop":
            influences = [-layer.block_influence for layer in profile.similarity]
            dropped = best_layers(influences, ratio, range(num_layers))
            return SkipParams(policy=policy, layers=dropped, warmup_tokens=0)
        case "early_exit":
            first, last = exit_range(ratio, num_layers)
            return SkipParams(
                policy=policy,
                first_exit=first,
                cold_start=last,
                cold_end=num_layers,
                warmup_tokens=0,
            )
    raise AssertionError(policy)
