"""Skip profiles as files, and what they say about ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from skipllm_core.errors import ProfileError
from skipllm_core.skip.profile import SkipProfile
from tests.skip.profiles import point, profile

PROFILE = profile(point(0.1, 0.98, 0.12), point(0.2, 0.96, 0.20), point(0.3, 0.9, 0.28))


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
        {"schema_version": 1},
        {"schema_version": "2"},
        {"fingerprint": "gone"},
        {"fingerprint": 7},
        {"surprise": 1},
        {"cold_start": -1},
        {"cold_start": 5},
        {"cold_end": 6},
        {"cold_end": -1},
        {"warmup_tokens": -1},
        {"warmup_tokens": 2.5},
        {"points": [{"threshold": 0.9}]},
        {"points": "many"},
        {"points": [msgspec.to_builtins(point(0.1, 0.9, 0.1)) | {"region": [3, 3]}]},
        {"points": [msgspec.to_builtins(point(0.1, 0.9, 0.1)) | {"region": None}]},
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
    bad = msgspec.to_builtins(PROFILE.ffn_skip[0]) | {"threshold": threshold}
    with pytest.raises(ProfileError, match="malformed"):
        SkipProfile.load(saved_with(tmp_path / "skip.yaml", ffn_skip=[bad]))


@pytest.mark.parametrize("text", ["", "[1, 2", "just text", "!!python/object:os.system {}", "\0"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "skip.yaml").write_text(text)
    with pytest.raises(ProfileError, match="malformed"):
        SkipProfile.load(tmp_path / "skip.yaml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="No such file"):
        SkipProfile.load(tmp_path / "skip.yaml")


def test_points_out_of_order_are_refused(tmp_path: Path) -> None:
    points = [msgspec.to_builtins(p) for p in reversed(PROFILE.ffn_skip)]
    with pytest.raises(ProfileError, match="must go from a low"):
        SkipProfile.load(saved_with(tmp_path / "skip.yaml", ffn_skip=points))


def test_a_profile_of_another_model_is_refused() -> None:
    PROFILE.check_model(PROFILE.fingerprint)
    with pytest.raises(ProfileError, match="another model"):
        PROFILE.check_model("f" * 64)


# Thresholds --------------------------------------------------------------------------------------


def test_thresholds_are_those_measured_and_between_them_linear() -> None:
    for ratio, threshold in ((0.12, 0.98), (0.16, 0.97), (0.20, 0.96), (0.06, 0.99)):
        assert PROFILE.blocks_at(ratio) == (pytest.approx(threshold), (1, 5))


def test_between_points_of_two_regions_the_nearer_is_taken() -> None:
    narrow = [point(0.1, 0.98, 0.12, region=(2, 4)), point(0.2, 0.96, 0.20, region=(2, 4))]
    both = profile(*narrow, point(0.3, 0.97, 0.28, region=(1, 5)))
    assert both.blocks_at(0.16) == (pytest.approx(0.97), (2, 4))
    assert both.blocks_at(0.23) == (0.96, (2, 4)), "thresholds of two regions do not mix"
    assert both.blocks_at(0.25) == both.blocks_at(0.28) == (0.97, (1, 5))


def test_the_last_target_is_within_reach_although_the_measurement_fell_short() -> None:
    assert PROFILE.max_ratio("ffn_skip") == 0.3
    assert PROFILE.blocks_at(0.3) == (0.9, (1, 5))


def test_a_profile_of_an_older_version_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="run `skipllm calibrate` again"):
        SkipProfile.load(saved_with(tmp_path / "skip.yaml", schema_version=1))


def test_an_agreement_takes_the_largest_ratio_that_keeps_it() -> None:
    found = profile(
        point(0.1, 0.98, top1_agreement=0.99),
        point(0.2, 0.96, top1_agreement=0.97),
        point(0.3, 0.9, top1_agreement=0.98),
        point(0.4, 0.8, top1_agreement=0.9),
    )
    assert found.ratio_at_agreement("ffn_skip", 0.98) == 0.3, "not the first that falls below"
    assert found.ratio_at_agreement("ffn_skip", 0.985) == 0.1
    assert found.ratio_at_agreement("ffn_skip", 0.995) is None


def test_the_widest_region_is_the_one_of_most_layers() -> None:
    found = profile(point(0.1, 0.9, region=(3, 5)), point(0.3, 0.9, region=(1, 5)), cold_end=4)
    assert found.widest_region == (1, 5)
