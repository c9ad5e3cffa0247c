"""A skip profile as a report tells it: every policy at equal shares of the FFN weights."""

from __future__ import annotations

from collections.abc import Sequence

from skipllm_core.skip.profile import MEASURED_POLICIES, SkipPoint, SkipProfile

LEAST_AGREEMENTS = (0.95, 0.9, 0.85, 0.8)


def share_at_agreement(points: Sequence[SkipPoint], least: float) -> float:
    """The largest share of FFN weights left out at which top-1 agreement is still `least`: between
    the measured points linearly, from the full model's (0, 1) on."""
    share, agreement = 0.0, 1.0
    for point in points:
        if point.top1_agreement < least:
            part = (agreement - least) / (agreement - point.top1_agreement)
            return share + part * (point.skipped_ffn_share - share)
        share, agreement = point.skipped_ffn_share, point.top1_agreement
    return share


def measured_policies(profile: SkipProfile) -> dict[str, Sequence[SkipPoint]]:
    """Those that the profile has points of."""
    found = {policy: profile.points(policy) for policy in MEASURED_POLICIES}
    return {policy: points for policy, points in found.items() if points}


def by_share(profile: SkipProfile) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table: agreement and KL of each policy, by the ratio asked for."""
    of = measured_policies(profile)
    targets = sorted({point.target_ratio for points in of.values() for point in points})
    lines = []
    for policy, points in of.items():
        at = {point.target_ratio: point for point in points}
        cells = [
            f"{at[t].top1_agreement:.3f} / {at[t].kl:.3f}" if t in at else "-" for t in targets
        ]
        lines.append([policy, *cells])
    return ["agreement / KL", *(f"{target:.0%}" for target in targets)], lines


def by_agreement(profile: SkipProfile) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table: the largest share left out at an agreement."""
    lines = [
        [policy, *(f"{share_at_agreement(points, least):.1%}" for least in LEAST_AGREEMENTS)]
        for policy, points in measured_policies(profile).items()
    ]
    return ["FFN share at agreement", *(f"{least:.2f}" for least in LEAST_AGREEMENTS)], lines
