"""Requests' wishes and the server's defaults, turned into settings."""

from __future__ import annotations

from typing import Any

import pytest

from skipllm_core.errors import InvalidRequestError
from skipllm_core.skip.amounts import SkipChoice
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, choose_skip, resolve_skip
from skipllm_core.types import SkipParams
from tests.skip.profiles import layer, point, profile

PROFILE = profile(point(0.1, 0.98, 0.12), point(0.2, 0.96, 0.20), point(0.3, 0.9, 0.28))
SKIPPING = SkipDefaults(policy="ffn_skip", ratio=0.2)


def test_a_ratio_brings_its_region_and_a_threshold_takes_the_profiles() -> None:
    narrow, wide = point(0.1, 0.98, region=(2, 4)), point(0.25, 0.97, region=(1, 5))
    both = profile(narrow, wide, cold_start=2, cold_end=4)
    skip = resolve_skip(SKIPPING, both, SkipOptions(ratio=0.25))
    assert (skip.threshold, skip.cold_start, skip.cold_end) == (0.97, 1, 5)
    skip = resolve_skip(SKIPPING, both, SkipOptions(threshold=0.97))
    assert (skip.cold_start, skip.cold_end) == (2, 4)


def resolve(defaults: SkipDefaults = SKIPPING, **wish: Any) -> SkipParams:
    return resolve_skip(defaults, PROFILE, SkipOptions(**wish))


def test_a_request_without_wishes_gets_the_servers_defaults() -> None:
    expected = SkipParams(
        policy="ffn_skip", threshold=0.96, warmup_tokens=3, cold_start=1, cold_end=5
    )
    assert resolve_skip(SKIPPING, PROFILE, None) == expected
    assert resolve() == expected
    assert resolve_skip(SkipDefaults(), None, None) == SkipParams()


def test_the_servers_warm_up_goes_before_the_profiles_and_the_requests_before_both() -> None:
    own = SkipDefaults(policy="ffn_skip", ratio=0.2, warmup_tokens=25, max_skips=4)
    assert resolve(own).warmup_tokens == 25
    assert resolve(own, warmup_tokens=0).warmup_tokens == 0
    assert resolve(own).max_skips == 4
    assert resolve(own, max_skips=0).max_skips == 0


def test_a_requests_ratio_replaces_the_servers_threshold_and_the_other_way_round() -> None:
    by_threshold = SkipDefaults(policy="ffn_skip", threshold=0.5)
    assert resolve(by_threshold).threshold == 0.5
    assert resolve(by_threshold, ratio=0.2).threshold == pytest.approx(0.96)
    assert resolve(threshold=0.7).threshold == 0.7
    assert resolve(threshold=-0.270657).threshold == -0.270657  # what a profile may hold, too


@pytest.mark.parametrize(
    "wish", [{"policy": "off"}, {"ratio": 0.0}, {"policy": "off", "ratio": 0.3}]
)
def test_ratio_zero_is_the_policy_off(wish: dict[str, Any]) -> None:
    assert resolve(**wish) == SkipParams(policy="never")
    assert resolve_skip(SkipDefaults(), None, SkipOptions(**wish)) == SkipParams(policy="never")


def test_a_servers_ratio_of_zero_is_off_until_a_request_wants_more() -> None:
    off = SkipDefaults(policy="ffn_skip", ratio=0.0)
    assert resolve(off).policy == "never"
    assert resolve(off, ratio=0.1).policy == "ffn_skip"


def test_a_request_can_skip_where_the_server_does_not_by_default() -> None:
    off = SkipDefaults(policy="never", ratio=0.2)
    assert resolve(off).policy == "never"
    assert resolve(off, policy="ffn_skip").threshold == pytest.approx(0.96)
    assert resolve(off, ratio=0.1).policy == "ffn_skip"
    assert resolve(off, warmup_tokens=0).policy == "never"


def test_prompts_are_skipped_where_the_request_wishes_it_and_anything_is() -> None:
    assert not resolve().prompt
    assert resolve(prompt=True).prompt
    assert resolve(prompt=True, policy="static", ratio=0.2).prompt
    always = SkipDefaults(policy="ffn_skip", ratio=0.2, prompt=True)
    assert resolve(always).prompt
    assert not resolve(always, prompt=False).prompt
    assert resolve(always, policy="off") == SkipParams(policy="never")
    assert resolve(prompt=True, policy="off") == SkipParams(policy="never")
    assert resolve(prompt=True, ratio=0.0) == SkipParams(policy="never")


def test_trace_is_kept_whether_skipping_or_not() -> None:
    assert resolve(trace=True).trace
    assert resolve(policy="off", trace=True).trace


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"ratio": 0.31}, "skip.ratio"),
        ({"ratio": -0.1}, "skip.ratio"),
        ({"ratio": float("nan")}, "skip.ratio"),
        ({"threshold": 1.0001}, "skip.threshold"),
        ({"threshold": -1.0001}, "skip.threshold"),
        ({"threshold": float("nan")}, "skip.threshold"),
        ({"ratio": 0.1, "threshold": 0.9}, "skip.threshold"),
        ({"warmup_tokens": -1}, "skip.warmup_tokens"),
        ({"max_skips": -1}, "skip.max_skips"),
    ],
)
def test_wishes_that_cannot_be_met_name_the_field(wish: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        resolve(**wish)
    assert caught.value.param == param


def test_skipping_without_a_profile_names_the_command_that_makes_one() -> None:
    for wish in ({"policy": "ffn_skip"}, {"ratio": 0.1}, {"threshold": 0.9}):
        with pytest.raises(InvalidRequestError, match="skipllm calibrate"):
            resolve_skip(SkipDefaults(), None, SkipOptions(**wish))


def test_an_amount_that_nobody_names_is_a_quarter_or_as_much_as_the_profile_reaches() -> None:
    assert choose_skip(SkipDefaults(), PROFILE, SkipOptions(policy="ffn_skip")).ratio == 0.25
    narrow = profile(point(0.2, 0.95))
    assert choose_skip(SkipDefaults(), narrow, SkipOptions(policy="ffn_skip")).ratio == 0.2
    assert choose_skip(SkipDefaults(policy="auto"), profile()) == SkipChoice()


# The policies that the paper compares with -------------------------------------------------------

# Similarity is highest in layers 2, 4 and 3; layer 5 matters least as a whole, then 2, then 0.
LAYERS = profile(
    point(0.2, 0.9, region=(2, 5)),
    point(0.5, 0.9, region=(1, 7)),
    num_layers=8,
    cold_start=2,
    cold_end=5,
    similarity=tuple(
        layer(mean, influence)
        for mean, influence in zip(
            (0.99, 0.90, 0.98, 0.94, 0.96, 0.92, 0.91, 0.99),
            (0.30, 0.60, 0.20, 0.50, 0.40, 0.10, 0.70, 0.80),
            strict=True,
        )
    ),
)


def of_layers(**wish: Any) -> SkipParams:
    return resolve_skip(SkipDefaults(), LAYERS, SkipOptions(**wish))


def test_static_takes_the_middle_blocks_of_the_highest_similarity() -> None:
    skip = of_layers(policy="static", ratio=0.25)
    assert skip == SkipParams(policy="static", layers=(2, 4), warmup_tokens=3)
    assert of_layers(policy="static", ratio=0.375).layers == (2, 3, 4)
    assert of_layers(policy="static", ratio=0.75, warmup_tokens=0).layers == (1, 2, 3, 4, 5, 6)


def test_random_spreads_the_ratio_over_the_widest_region() -> None:
    skip = of_layers(policy="random", ratio=0.25)  # 2 of 8 blocks, from the 5 behind the first
    assert (skip.cold_start, skip.cold_end) == (2, 7)
    assert skip.probability == pytest.approx(2 / 5)
    assert of_layers(policy="random", ratio=0.5).probability == pytest.approx(4 / 5)
    assert of_layers(policy="random", ratio=0.625).probability == 1


def test_layer_drop_takes_the_layers_of_the_least_influence_and_has_no_warm_up() -> None:
    skip = of_layers(policy="layer_drop", ratio=0.375)
    assert skip == SkipParams(policy="layer_drop", layers=(0, 2, 5), warmup_tokens=0)


def test_early_exit_leaves_the_ratio_out_on_the_mean_of_its_exits() -> None:
    skip = of_layers(policy="early_exit", ratio=0.25, budget_tokens=30)
    assert (skip.first_exit, skip.cold_start, skip.cold_end) == (8, 4, 8)
    assert (skip.budget_tokens, skip.warmup_tokens) == (30, 0)
    skip = of_layers(policy="early_exit", ratio=0.625)  # of 8, 3 are left
    assert (skip.first_exit, skip.cold_start) == (5, 1)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"policy": "static", "ratio": 0.8}, "skip.ratio"),
        ({"policy": "random", "ratio": 0.63}, "skip.ratio"),
        ({"policy": "layer_drop", "ratio": 0.9}, "skip.ratio"),
        ({"policy": "early_exit", "ratio": 0.9}, "skip.ratio"),
        ({"policy": "static", "threshold": 0.9}, "skip.threshold"),
        ({"policy": "random", "ratio": 0.1, "max_skips": 1}, "skip.max_skips"),
        ({"policy": "layer_drop", "ratio": 0.1, "warmup_tokens": 1}, "skip.warmup_tokens"),
        ({"policy": "ffn_skip", "ratio": 0.1, "budget_tokens": 9}, "skip.budget_tokens"),
        ({"policy": "early_exit", "ratio": 0.1, "budget_tokens": 0}, "skip.budget_tokens"),
    ],
)
def test_what_a_policy_cannot_do_names_the_field(wish: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        of_layers(**wish)
    assert caught.value.param == param


def test_a_ratio_alone_goes_to_the_servers_policy() -> None:
    static = SkipDefaults(policy="static", ratio=0.25)
    assert resolve_skip(static, LAYERS, None).layers == (2, 4)
    assert resolve_skip(static, LAYERS, SkipOptions(ratio=0.375)).layers == (2, 3, 4)
