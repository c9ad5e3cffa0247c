"""What `auto` chooses, and how the server's settings and a request's wish go together."""

from __future__ import annotations

from typing import Any

import pytest

from skipllm_core.errors import InvalidRequestError
from skipllm_core.skip.amounts import SkipChoice
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, choose_skip, resolve_skip
from skipllm_core.types import SkipPolicyName
from tests.skip.profiles import baseline_point, neuron_point, point, profile

# Blocks cost less than neurons up to 0.15, and neurons alone go beyond 0.3. What is for comparison
# costs nothing here, so that it would be chosen if it could be.
PROFILE = profile(
    point(0.1, 0.98, kl=0.01, top1_agreement=0.99),
    point(0.2, 0.95, kl=0.2, top1_agreement=0.9),
    point(0.3, 0.9, kl=0.6, top1_agreement=0.8),
    neurons=(
        neuron_point(0.1, kl=0.04, top1_agreement=0.97),
        neuron_point(0.2, kl=0.08, top1_agreement=0.95),
        neuron_point(0.5, kl=0.4, top1_agreement=0.85),
    ),
    static=(baseline_point(0.3, kl=0.9, top1_agreement=0.7),),
    random=(baseline_point(0.5, kl=0.0, top1_agreement=1.0),),
    layer_drop=(baseline_point(0.5, kl=0.0, top1_agreement=1.0),),
    early_exit=(baseline_point(0.5, kl=0.0, top1_agreement=1.0),),
)
WITHOUT_NEURONS: list[SkipPolicyName] = ["never", "ffn_skip", "static"]
AUTO = SkipDefaults(policy="auto")


def chosen(
    defaults: SkipDefaults, wish: dict[str, Any], runnable: list[SkipPolicyName] | None = None
) -> SkipChoice:
    more = () if runnable is None else (runnable,)
    return choose_skip(defaults, PROFILE, SkipOptions(**wish), *more)


@pytest.mark.parametrize(
    ("ratio", "policy"),
    [(0.05, "ffn_skip"), (0.1, "ffn_skip"), (0.2, "neurons"), (0.3, "neurons"), (0.5, "neurons")],
)
def test_auto_takes_the_policy_of_the_lowest_kl_at_the_ratio(ratio: float, policy: str) -> None:
    assert chosen(AUTO, {"ratio": ratio}) == SkipChoice(policy, ratio)
    assert chosen(SkipDefaults(policy="auto", ratio=ratio), {}) == SkipChoice(policy, ratio)


def test_between_points_kl_and_agreement_are_linear_from_nothing_lost_on() -> None:
    # ffn_skip 0.01 + 0.19 x share, neurons 0.04 + 0.04 x share: equal where the share is 0.2.
    assert chosen(AUTO, {"ratio": 0.119}).policy == "ffn_skip"
    assert chosen(AUTO, {"ratio": 0.121}).policy == "neurons"
    found = PROFILE.expected("neurons", 0.05)
    assert (found.top1_agreement, found.kl) == pytest.approx((0.985, 0.02))
    found = PROFILE.expected("neurons", 0.35)
    assert (found.top1_agreement, found.kl) == pytest.approx((0.9, 0.24))


def test_a_point_that_falls_short_of_its_target_is_no_cheaper_for_it() -> None:
    short = profile(
        point(0.1, 0.95, kl=0.1),
        point(0.3, 0.9, measured=0.2, kl=0.2),
        neurons=(neuron_point(0.3, kl=0.25),),
    )
    assert short.expected("ffn_skip", 0.3).kl == pytest.approx(0.3)
    assert choose_skip(AUTO, short, SkipOptions(ratio=0.3)).policy == "neurons"
    assert choose_skip(AUTO, short, SkipOptions(ratio=0.3), WITHOUT_NEURONS).policy == "ffn_skip"


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (0.98, SkipChoice("ffn_skip", 0.1)),
        (0.96, SkipChoice("neurons", 0.1)),  # as much as blocks; no point beyond is so good
        (0.95, SkipChoice("neurons", 0.2)),
        (0.8, SkipChoice("neurons", 0.5)),
    ],
)
def test_at_a_least_agreement_auto_takes_what_leaves_out_the_most(
    least: float, expected: SkipChoice
) -> None:
    assert choose_skip(SkipDefaults(policy="auto", min_agreement=least), PROFILE) == expected


def test_a_policy_that_the_engine_does_not_run_is_not_chosen_and_naming_it_is_refused() -> None:
    assert chosen(AUTO, {"ratio": 0.3}, WITHOUT_NEURONS) == SkipChoice("ffn_skip", 0.3)
    with pytest.raises(InvalidRequestError, match=r"goes up to 0\.30") as caught:
        chosen(AUTO, {"ratio": 0.4}, WITHOUT_NEURONS)
    assert caught.value.param == "skip.ratio"
    with pytest.raises(InvalidRequestError, match="--enforce-eager") as caught:
        chosen(AUTO, {"policy": "neurons"}, WITHOUT_NEURONS)
    assert caught.value.param == "skip.policy"


NEVER = SkipDefaults(policy="never")
AUTO_TENTH = SkipDefaults(policy="auto", ratio=0.1)
AUTO_95 = SkipDefaults(policy="auto", min_agreement=0.95)
AUTO_BOUNDED = SkipDefaults(policy="auto", max_skips=2)
AUTO_COSINE = SkipDefaults(policy="auto", threshold=0.9)
NEURONS = SkipDefaults(policy="neurons", ratio=0.4)
STATIC = SkipDefaults(policy="static", ratio=0.2)
COSINE = SkipDefaults(policy="ffn_skip", threshold=0.9)
OFF = SkipChoice()
BY_COSINE = SkipChoice("ffn_skip", threshold=0.8)


@pytest.mark.parametrize(
    ("defaults", "wish", "expected"),
    [
        # Nothing is wished.
        (NEVER, {}, OFF),
        (AUTO, {}, SkipChoice("neurons", 0.25)),
        (AUTO_TENTH, {}, SkipChoice("ffn_skip", 0.1)),
        (AUTO_95, {}, SkipChoice("neurons", 0.2)),
        (AUTO_BOUNDED, {}, SkipChoice("ffn_skip", 0.25)),
        (AUTO_COSINE, {}, SkipChoice("ffn_skip", threshold=0.9)),
        (NEURONS, {}, SkipChoice("neurons", 0.4)),
        # A ratio alone.
        (NEVER, {"ratio": 0.1}, SkipChoice("ffn_skip", 0.1)),
        (NEVER, {"ratio": 0.2}, SkipChoice("neurons", 0.2)),
        (AUTO_95, {"ratio": 0.1}, SkipChoice("ffn_skip", 0.1)),
        (AUTO_BOUNDED, {"ratio": 0.2}, SkipChoice("ffn_skip", 0.2)),
        (AUTO_COSINE, {"ratio": 0.2}, SkipChoice("neurons", 0.2)),
        (NEURONS, {"ratio": 0.1}, SkipChoice("neurons", 0.1)),
        (STATIC, {"ratio": 0.1}, SkipChoice("static", 0.1)),
        (COSINE, {"ratio": 0.2}, SkipChoice("ffn_skip", 0.2)),
        (AUTO, {"ratio": 0}, OFF),
        # A threshold alone is one of ffn_skip.
        (NEVER, {"threshold": 0.8}, BY_COSINE),
        (AUTO_TENTH, {"threshold": 0.8}, BY_COSINE),
        (NEURONS, {"threshold": 0.8}, BY_COSINE),
        (AUTO, {"policy": "auto", "threshold": 0.8}, BY_COSINE),
        # A policy alone, with the server's amount where it means something to that policy.
        (NEVER, {"policy": "auto"}, SkipChoice("neurons", 0.25)),
        (NEVER, {"policy": "ffn_skip"}, SkipChoice("ffn_skip", 0.25)),
        (AUTO_TENTH, {"policy": "neurons"}, SkipChoice("neurons", 0.1)),
        (AUTO_95, {"policy": "ffn_skip"}, SkipChoice("ffn_skip", 0.1)),
        (AUTO_COSINE, {"policy": "neurons"}, SkipChoice("neurons", 0.25)),
        (COSINE, {"policy": "auto"}, SkipChoice("ffn_skip", threshold=0.9)),
        (STATIC, {"policy": "auto"}, SkipChoice("neurons", 0.2)),
        (NEURONS, {"policy": "off"}, OFF),
        (NEURONS, {"policy": "random"}, SkipChoice("random", 0.4)),
        # Both.
        (COSINE, {"policy": "neurons", "ratio": 0.1}, SkipChoice("neurons", 0.1)),
        (NEURONS, {"policy": "auto", "ratio": 0.1}, SkipChoice("ffn_skip", 0.1)),
        # What is wished besides narrows what auto chooses from.
        (AUTO, {"max_skips": 2}, SkipChoice("ffn_skip", 0.25)),
        (AUTO, {"warmup_tokens": 2}, SkipChoice("neurons", 0.25)),
    ],
)
def test_what_a_request_gets_under_the_servers_settings(
    defaults: SkipDefaults, wish: dict[str, Any], expected: SkipChoice
) -> None:
    assert chosen(defaults, wish) == expected
    assert resolve_skip(defaults, PROFILE, SkipOptions(**wish)).policy == expected.policy


@pytest.mark.parametrize(
    ("defaults", "wish", "param"),
    [
        (AUTO, {"policy": "neurons", "max_skips": 2}, "skip.max_skips"),
        (AUTO, {"policy": "neurons", "threshold": 0.9}, "skip.threshold"),
        (NEURONS, {"max_skips": 2}, "skip.max_skips"),
        (AUTO, {"budget_tokens": 9}, "skip.budget_tokens"),
        (AUTO, {"ratio": 0.6}, "skip.ratio"),
        (AUTO_BOUNDED, {"ratio": 0.4}, "skip.ratio"),
        (NEURONS, {"policy": "ffn_skip"}, "skip.ratio"),  # the server's 0.4 is beyond its blocks
        (AUTO_95, {"policy": "static"}, "skip.policy"),
    ],
)
def test_a_wish_that_contradicts_itself_or_goes_too_far_names_the_field(
    defaults: SkipDefaults, wish: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chosen(defaults, wish)
    assert caught.value.param == param


def test_the_servers_bound_of_skips_holds_for_blocks_and_not_for_neurons() -> None:
    skip = resolve_skip(AUTO_BOUNDED, PROFILE, None)
    assert (skip.policy, skip.max_skips) == ("ffn_skip", 2)
    skip = resolve_skip(AUTO_BOUNDED, PROFILE, SkipOptions(policy="neurons"))
    assert (skip.policy, skip.max_skips) == ("neurons", None)


def test_a_model_without_a_profile_has_nothing_to_choose_from() -> None:
    with pytest.raises(InvalidRequestError, match="skipllm calibrate"):
        choose_skip(NEVER, None, SkipOptions(policy="auto"))
