"""Skip profiles as files, and requests' wishes turned into settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from skipllm_core.errors import InvalidRequestError, ProfileError
from skipllm_core.skip.profile import (
    LayerSimilarity,
    SkipDefaults,
    SkipOptions,
    SkipPoint,
    SkipProfile,
    resolve_skip,
)
from skipllm_core.types import SkipParams


def point(ratio: float, threshold: float, measured: float) -> SkipPoint:
    return SkipPoint(
        target_ratio=ratio,
        threshold=threshold,
        token_skip_ratio=measured,
        top1_agreement=0.98,
        kl=0.01,
        trigger_layers=(0, 3, 2, 0, 0, 0),
        num_tokens=7,
    )


SIMILARITY = LayerSimilarity(mean=0.9, p05=0.8, p25=0.85, p50=0.9, p75=0.92, p95=0.99)
PROFILE = SkipProfile(
    fingerprint="0123456789abcdef" * 4,
    model={"model_type": "llama", "num_layers": 6},
    cold_start=1,
    cold_end=5,
    warmup_tokens=3,
    num_prompts=10,
    num_tokens=200,
    points=(point(0.1, 0.98, 0.12), point(0.2, 0.96, 0.20), point(0.3, 0.9, 0.28)),
    similarity=(SIMILARITY,) * 6,
)
SKIPPING = SkipDefaults(policy="ffn_skip", ratio=0.2)


# The file ----------------------------------------------------------------------------------------


def test_a_saved_profile_loads_as_it_was(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "skip.yaml")
    assert SkipProfile.load(tmp_path / "skip.yaml") == PROFILE


def saved_with(path: Path, **changes: Any) -> Path:
    data = msgspec.to_builtins(PROFILE) | changes
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value != "gone"}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"fingerprint": "gone"},
        {"fingerprint": 7},
        {"surprise": 1},
        {"cold_start": 0},
        {"cold_start": 5},
        {"cold_end": 6},
        {"cold_end": -1},
        {"warmup_tokens": -1},
        {"warmup_tokens": 2.5},
        {"points": [{"threshold": 0.9}]},
        {"points": "many"},
        {"points": [msgspec.to_builtins(point(0.1, 0.9, 0.1)) | {"region": [2, 5]}]},
        {"points": [msgspec.to_builtins(point(0.1, 0.9, 0.1)) | {"region": [1, 6]}]},
        {"similarity": []},
        {"similarity": [{"mean": float("nan")}]},
    ],
)
def test_a_malformed_profile_is_refused_in_one_line(tmp_path: Path, changes: Any) -> None:
    path = saved_with(tmp_path / "skip.yaml", **changes)
    with pytest.raises(ProfileError, match=r"skip\.yaml") as caught:
        SkipProfile.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), 1.1, "0.9", True])
def test_a_threshold_that_is_no_cosine_is_refused(tmp_path: Path, threshold: object) -> None:
    bad = msgspec.to_builtins(PROFILE.points[0]) | {"threshold": threshold}
    with pytest.raises(ProfileError, match="malformed"):
        SkipProfile.load(saved_with(tmp_path / "skip.yaml", points=[bad]))


@pytest.mark.parametrize("text", ["", "[1, 2", "just text", "!!python/object:os.system {}", "\0"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "skip.yaml").write_text(text)
    with pytest.raises(ProfileError, match="malformed"):
        SkipProfile.load(tmp_path / "skip.yaml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file"):
        SkipProfile.load(tmp_path / "skip.yaml")


def test_points_out_of_order_are_refused(tmp_path: Path) -> None:
    points = [msgspec.to_builtins(p) for p in reversed(PROFILE.points)]
    with pytest.raises(ProfileError, match="points must go"):
        SkipProfile.load(saved_with(tmp_path / "skip.yaml", points=points))


def test_a_profile_of_another_model_is_refused() -> None:
    PROFILE.check_model(PROFILE.fingerprint)
    with pytest.raises(ProfileError, match="another model"):
        PROFILE.check_model("f" * 64)


# Thresholds --------------------------------------------------------------------------------------


def test_thresholds_are_those_measured_and_between_them_linear() -> None:
    for ratio, threshold in ((0.12, 0.98), (0.16, 0.97), (0.20, 0.96), (0.06, 0.99)):
        assert PROFILE.at_ratio(ratio) == (pytest.approx(threshold), (1, 5))


def test_a_ratio_beyond_the_regions_reach_takes_a_wider_one() -> None:
    narrow = msgspec.structs.replace(PROFILE, cold_start=2, cold_end=4)
    wide = msgspec.structs.replace(PROFILE.points[2], threshold=0.97, region=(1, 5))
    both = msgspec.structs.replace(narrow, points=(*PROFILE.points[:2], wide))
    assert both.at_ratio(0.16) == (pytest.approx(0.97), (2, 4))
    assert both.at_ratio(0.23) == (0.96, (2, 4)), "thresholds of two regions do not mix"
    assert both.at_ratio(0.25) == both.at_ratio(0.28) == (0.97, (1, 5))
    skip = resolve_skip(SKIPPING, both, SkipOptions(ratio=0.28))
    assert (skip.threshold, skip.cold_start, skip.cold_end) == (0.97, 1, 5)
    skip = resolve_skip(SKIPPING, both, SkipOptions(threshold=0.97))
    assert (skip.cold_start, skip.cold_end) == (2, 4)


def test_the_last_target_is_within_reach_although_the_measurement_fell_short() -> None:
    assert PROFILE.max_ratio == 0.3
    assert PROFILE.at_ratio(0.3) == (0.9, (1, 5))


# Wishes ------------------------------------------------------------------------------------------


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


def test_skipping_without_an_amount_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="How much"):
        resolve(SkipDefaults(policy="never"), policy="ffn_skip")
