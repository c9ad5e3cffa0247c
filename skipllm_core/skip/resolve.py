"""Wishes made numbers: the server's settings and a request's `skip` object into `SkipParams`.

No torch here: the server process does this.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from skipllm_core.errors import InvalidRequestError
from skipllm_core.skip.amounts import SkipChoice, max_ratio, to_params
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.types import SkipParams, SkipPolicyName

ALL_POLICIES: tuple[SkipPolicyName, ...] = get_args(SkipPolicyName)

# What `auto` chooses from: what is fast, and adapts to each token or is fixed. The others are for
# comparison. Of equals the first.
AUTO_POLICIES: tuple[SkipPolicyName, ...] = ("neurons", "ffn_skip", "static")
DEFAULT_SKIP_RATIO = 0.25  # where neither request nor server say how much

# The policies that each of these numbers means something to.
_ADAPTIVE: tuple[SkipPolicyName, ...] = ("ffn_skip",)
_NEED_POINTS: tuple[SkipPolicyName, ...] = ("ffn_skip", "neurons")  # have measured thresholds
OF_POLICIES: dict[str, tuple[SkipPolicyName, ...]] = {
    "threshold": _ADAPTIVE,
    "max_skips": _ADAPTIVE,
    "warmup_tokens": ("ffn_skip", "neurons", "static", "random"),
    "budget_tokens": ("early_exit",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipDefaults:
    """The server's settings, used where a request says nothing. Of ratio, threshold and
    `min_agreement` (the largest ratio that keeps it) at most one."""

    policy: Literal["auto", SkipPolicyName] = "never"
    ratio: float | None = None
    threshold: float | None = None
    min_agreement: float | None = None
    warmup_tokens: int | None = None  # None: the profile's
    max_skips: int | None = None
    prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipOptions:
    """What one request wishes; None: the server's default."""

    policy: Literal["off", "auto", SkipPolicyName] | None = None
    ratio: float | None = None
    threshold: float | None = None
    warmup_tokens: int | None = None
    max_skips: int | None = None
    budget_tokens: int | None = None
    trace: bool | None = None
    prompt: bool | None = None


def resolve_skip(
    defaults: SkipDefaults,
    profile: SkipProfile | None,
    options: SkipOptions | None,
    runnable: Collection[SkipPolicyName] = ALL_POLICIES,
) -> SkipParams:
    """One sequence's settings. Raises InvalidRequestError where the wish cannot be met."""
    wish = options or SkipOptions()
    choice = choose_skip(defaults, profile, wish, runnable)
    trace = bool(wish.trace)
    if choice.policy == "never":
        return SkipParams(policy="never", trace=trace)
    assert profile is not None, "nothing else was chosen without one"
    amount = to_params(choice, profile)
    if choice.policy in OF_POLICIES["warmup_tokens"]:
        warmup = _first(wish.warmup_tokens, defaults.warmup_tokens, profile.warmup_tokens)
        amount = replace(amount, warmup_tokens=warmup)
    if choice.policy in OF_POLICIES["max_skips"]:
        amount = replace(amount, max_skips=_max_skips(defaults, wish))
    prompt = defaults.prompt if wish.prompt is None else wish.prompt
    return replace(amount, budget_tokens=wish.budget_tokens, trace=trace, prompt=prompt)


def choose_skip(
    defaults: SkipDefaults,
    profile: SkipProfile | None,
    options: SkipOptions | None = None,
    runnable: Collection[SkipPolicyName] = ALL_POLICIES,
) -> SkipChoice:
    """The policy and how much of it; raises InvalidRequestError.

    A request that names an amount (a ratio or a threshold) skips even where the server's default is
    not to; a threshold is one of `ffn_skip`. `auto` takes what the profile shows best: of the
    policies that the engine runs, and that all other numbers mean something to. Ratio 0 is the
    policy `never`.
    """
    wish = options or SkipOptions()
    _check_ranges(wish)
    policy = _policy(defaults, wish)
    amount = _wanted(defaults, wish)
    if policy == "never" or amount.ratio == 0:
        return SkipChoice()
    named = AUTO_POLICIES if policy == "auto" else (policy,)
    for name, policies in OF_POLICIES.items():
        if getattr(wish, name) is not None and not set(policies) & set(named):
            raise InvalidRequestError(
                f"skip.{name} means nothing to the policy {policy}.", param=f"skip.{name}"
            )
    if profile is None:
        raise InvalidRequestError(
            "This model has no skip profile, so FFN skipping is not available. "
            "`skipllm calibrate` makes one.",
            param="skip",
        )
    if policy != "auto":
        check_runnable(policy, runnable)
        return _of_policy(policy, profile, amount)
    numbers = {
        "threshold": amount.threshold,
        "max_skips": _max_skips(defaults, wish),
        "warmup_tokens": wish.warmup_tokens,
    }
    given = [name for name, number in numbers.items() if number is not None]
    candidates = [
        policy
        for policy in AUTO_POLICIES
        if policy in runnable and all(policy in OF_POLICIES[name] for name in given)
    ]
    return _best(candidates, profile, amount)


def check_runnable(policy: SkipPolicyName, runnable: Collection[SkipPolicyName]) -> None:
    """Raises InvalidRequestError for a policy that the engine's decode step does not know."""
    if policy not in runnable:
        raise InvalidRequestError(
            f"The decode kernels here do not run the skip policy {policy}: start the server with "
            "--enforce-eager for it.",
            param="skip.policy",
        )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How much to skip; all None: it is not said."""

    ratio: float | None = None
    threshold: float | None = None
    min_agreement: float | None = None
    is_servers: bool = True

    def check_reached(self, ratio: float, most: float, policy: str) -> None:
        if ratio > most:
            whose = " (it is the server's default)" if self.is_servers else ""
            raise InvalidRequestError(
                f"skip.ratio {ratio:g} is out of reach{whose}: under {policy} the skip profile of "
                f"this model goes up to {most:.2f}.",
                param="skip.ratio",
            )


def _wanted(defaults: SkipDefaults, wish: SkipOptions) -> _Wanted:
    if wish.ratio is not None or wish.threshold is not None:
        return _Wanted(wish.ratio, wish.threshold, is_servers=False)
    return _Wanted(defaults.ratio, defaults.threshold, defaults.min_agreement)


def _policy(defaults: SkipDefaults, wish: SkipOptions) -> Literal["auto", SkipPolicyName]:
    if wish.policy is not None:
        return "never" if wish.policy == "off" else wish.policy
    if wish.threshold is not None:
        return "ffn_skip"
    if defaults.policy == "never" and wish.ratio is not None:
        return "auto"
    return defaults.policy


def _of_policy(policy: SkipPolicyName, profile: SkipProfile, wanted: _Wanted) -> SkipChoice:
    """So much of a policy that was named. A threshold that it has no use for is the server's."""
    if policy in _NEED_POINTS and not profile.points(policy):
        raise InvalidRequestError(
            f"The skip profile of this model has no measurements of the policy {policy}. "
            "`skipllm calibrate` makes them.",
            param="skip.policy",
        )
    if wanted.threshold is not None and policy in OF_POLICIES["threshold"]:
        return SkipChoice(policy, threshold=wanted.threshold)
    most = max_ratio(policy, profile)
    if wanted.ratio is not None:
        wanted.check_reached(wanted.ratio, most, policy)
        return SkipChoice(policy, wanted.ratio)
    if wanted.min_agreement is not None:
        ratio = profile.ratio_at_agreement(policy, wanted.min_agreement)
        if ratio is None:
            raise _never_agrees(wanted.min_agreement, profile, (policy,))
        return SkipChoice(policy, ratio)
    return SkipChoice(policy, min(DEFAULT_SKIP_RATIO, most))


def _best(policies: Sequence[SkipPolicyName], profile: SkipProfile, wanted: _Wanted) -> SkipChoice:
    """The best of the policies that were measured; `never` where none was and nothing is wanted."""
    if wanted.threshold is not None:
        return _of_policy("ffn_skip", profile, wanted)
    if wanted.min_agreement is not None:
        best = profile.best_at_agreement(wanted.min_agreement, policies)
        if best is None:
            raise _never_agrees(wanted.min_agreement, profile, policies)
        return SkipChoice(*best)
    most = max((profile.max_ratio(policy) for policy in policies), default=0.0)
    ratio = min(DEFAULT_SKIP_RATIO, most) if wanted.ratio is None else wanted.ratio
    wanted.check_reached(ratio, most, "auto")
    policy = profile.best_at(ratio, policies) if ratio else None
    return SkipChoice() if policy is None else SkipChoice(policy, ratio)


def _never_agrees(
    least: float, profile: SkipProfile, policies: Sequence[SkipPolicyName]
) -> InvalidRequestError:
    best = max(
        (point.top1_agreement for policy in policies for point in profile.points(policy)),
        default=1.0,
    )
    return InvalidRequestError(
        f"No ratio keeps a top-1 agreement of {least:g}: the best that the skip profile shows of "
        f"{' or '.join(policies)} is {best:.3f}.",
        param="skip.policy",
    )


def _max_skips(defaults: SkipDefaults, wish: SkipOptions) -> int | None:
    return defaults.max_skips if wish.max_skips is None else wish.max_skips


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
