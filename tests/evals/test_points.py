"""A skip profile, as the report tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipllm_core.evals.figures import draw_points
from skipllm_core.evals.points import share_at_agreement
from skipllm_core.evals.report import markdown
from tests.skip.profiles import baseline_point, neuron_point, profile

NEURONS = (
    neuron_point(0.2, top1_agreement=0.95, kl=0.02),
    neuron_point(0.4, top1_agreement=0.85, kl=0.2),
)
STATIC = (baseline_point(0.2, top1_agreement=0.8, kl=0.5),)


@pytest.mark.parametrize(
    ("least", "share"), [(1.0, 0.0), (0.975, 0.1), (0.95, 0.2), (0.9, 0.3), (0.5, 0.4)]
)
def test_the_share_at_an_agreement_lies_between_the_measured(least: float, share: float) -> None:
    assert share_at_agreement(NEURONS, least) == pytest.approx(share)


def test_the_report_sets_the_measured_policies_side_by_side() -> None:
    lines = markdown({"model": "m"}, [], profile(neurons=NEURONS, static=STATIC)).split("\n")
    assert "| agreement / KL | 20% | 40% |" in lines
    assert "| neurons | 0.950 / 0.020 | 0.850 / 0.200 |" in lines
    assert "| static | 0.800 / 0.500 | - |" in lines
    assert "| neurons | 20.0% | 30.0% | 40.0% | 40.0% |" in lines
    assert "| static | 5.0% | 10.0% | 15.0% | 20.0% |" in lines
    assert not any(line.startswith("| ffn_skip") for line in lines)  # was not measured


def test_the_figure_of_the_profile_is_drawn(tmp_path: Path) -> None:
    draw_points(tmp_path / "points.png", "m", profile(neurons=NEURONS, static=STATIC))
    assert (tmp_path / "points.png").stat().st_size > 10_000
