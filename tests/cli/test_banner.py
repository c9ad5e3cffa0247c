"""What the server says of skipping when it is ready."""

from __future__ import annotations

from typing import Any

import pytest

from server.cli.banner import describe_skipping
from skipllm_core.errors import InvalidRequestError
from skipllm_core.skip.resolve import ALL_POLICIES, SkipDefaults
from tests.skip.profiles import baseline_point, neuron_point, point, profile

PROFILE = profile(
    point(0.1, 0.98, kl=0.2, top1_agreement=0.95),
    point(0.3, 0.9, kl=0.6, top1_agreement=0.8),
    neurons=(neuron_point(0.3, kl=0.06, top1_agreement=0.94),),
    static=(baseline_point(0.2, kl=0.7, top1_agreement=0.7),),
)


def told(**settings: Any) -> list[str]:
    return describe_skipping(SkipDefaults(**settings), PROFILE, ALL_POLICIES)


def test_the_choice_of_auto_is_told_with_what_it_costs_and_what_the_others_would() -> None:
    assert told(policy="auto") == [
        "auto chose neurons, ratio 0.25, thresholds by layer, after 3 full tokens",
        "there its profile has a top-1 agreement of 0.950 and a KL of 0.05 "
        "(ffn_skip: KL 0.5, static: out of reach)",
    ]
    assert told(policy="auto", min_agreement=0.94, warmup_tokens=0) == [
        "auto chose neurons, ratio 0.3, thresholds by layer",
        "there its profile has a top-1 agreement of 0.940 and a KL of 0.06 "
        "(ffn_skip: ratio 0.1, static: ratio 0)",
    ]


def test_a_policy_that_was_named_is_told_without_the_others() -> None:
    assert told(policy="ffn_skip", ratio=0.1, warmup_tokens=1) == [
        "ffn_skip, ratio 0.1, threshold 0.98 in layers 1 to 4, after 1 full token",
        "there its profile has a top-1 agreement of 0.950 and a KL of 0.2",
    ]
    assert told(policy="static", ratio=0.5) == [
        "static, ratio 0.5, always layers 1, 2, 3, after 3 full tokens"  # beyond what was measured
    ]
    assert told(policy="auto", threshold=0.9) == [
        "auto chose ffn_skip, threshold 0.9 in layers 1 to 4, after 3 full tokens"
    ]
    assert told() == ["off"]


def test_a_policy_that_the_engine_does_not_run_is_told_at_start() -> None:
    with pytest.raises(InvalidRequestError, match="do not run the skip policy neurons"):
        describe_skipping(SkipDefaults(policy="neurons"), PROFILE, ["never", "ffn_skip"])
