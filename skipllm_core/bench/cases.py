"""What `skipllm bench decode` measures: one case per batch size and policy. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from skipllm_core.errors import ConfigError
from skipllm_core.types import SkipParams

BenchPolicy = Literal["never", "ffn_skip", "neurons", "forced", "mixed"]

UNREACHABLE = 1.01  # a similarity that no token has
DEFAULT_FORCED_RATIOS = (0.1, 0.25, 0.4)
MAX_NEURON_SHARE = 0.66  # of the FFN weights: the gates, a third, are always read
NEVER = SkipParams(policy="never")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Decode steps of `batch` rows under one policy.

    never           every FFN block
    ffn_skip        the adaptive gate under `skip`
    neurons         the neurons that `skip` leaves out; with a `neuron_share`, those below
                    thresholds that leave out about this share of a row's FFN weights: each row by
                    itself, or the rows together
    forced, mixed   row r skips `forced_skips[r]` FFN blocks: all rows as many, or not
    """

    batch: int
    policy: BenchPolicy = "never"
    engine: Literal["skipllm", "transformers"] = "skipllm"
    skip: SkipParams = NEVER
    skip_ratio: float | None = None  # that `skip` was asked for; None: that nothing be skipped
    forced_skips: tuple[int, ...] = ()
    neuron_share: float | None = None
    is_joint: bool = False

    @property
    def label(self) -> str:
        if self.engine == "transformers":
            return "transformers"
        if self.policy == "forced":
            return f"forced {self.forced_skips[0]}"
        if self.policy == "mixed":
            return f"mixed {min(self.forced_skips)}-{max(self.forced_skips)}"
        if self.neuron_share is not None:
            return f"{'joint' if self.is_joint else 'forced'} neurons {self.neuron_share:.0%}"
        if self.skip_ratio is not None:
            return f"{self.policy} {self.skip_ratio:.0%}"
        return "gate only" if self.policy == "ffn_skip" else self.policy


def make_cases(
    num_layers: int,
    *,
    batches: Sequence[int],
    policies: Collection[str] = ("never", "ffn_skip", "forced"),
    forced_skips: Sequence[int] | None = None,
    has_mixed: bool = False,
    skips: Sequence[tuple[float, SkipParams]] = (),
    neurons: Sequence[tuple[float, SkipParams]] = (),
    neuron_shares: Sequence[float] = (),
    compare: bool = False,
) -> list[Case]:
    """`never` is always measured: the others are told against it. `skips` has the ratios asked of
    the model's profile, with what they are to `ffn_skip`; `neurons` those to that policy. Raises
    ConfigError."""
    if forced_skips is None:
        forced_skips = [round(ratio * num_layers) for ratio in DEFAULT_FORCED_RATIOS]
    if max(forced_skips, default=0) > num_layers:
        raise ConfigError(
            f"--forced-skip {max(forced_skips)}: the model has only {num_layers} FFN blocks"
        )
    # The gate alone: all similarities are taken, and none is high enough.
    region = skips[0][1] if skips else SkipParams(cold_start=1, cold_end=num_layers - 1)
    gate_only = SkipParams(
        policy="ffn_skip",
        threshold=UNREACHABLE,
        warmup_tokens=0,
        cold_start=region.cold_start,
        cold_end=region.cold_end,
    )
    cases = []
    for batch in batches:
        cases.append(Case(batch=batch))
        if "ffn_skip" in policies:
            cases.append(Case(batch=batch, policy="ffn_skip", skip=gate_only))
            cases += [
                Case(batch=batch, policy="ffn_skip", skip=skip, skip_ratio=ratio)
                for ratio, skip in skips
            ]
        cases += [
            Case(batch=batch, policy="neurons", skip=skip, skip_ratio=ratio)
            for ratio, skip in neurons
        ]
        if "forced" in policies:
            cases += [
                Case(batch=batch, policy="forced", forced_skips=(count,) * batch)
                for count in dict.fromkeys(forced_skips)
            ]
        cases += [
            Case(batch=batch, policy="neurons", neuron_share=share, is_joint=is_joint)
            for share in neuron_shares
            for is_joint in ((False, True) if batch > 1 else (False,))
        ]
        if has_mixed and batch > 1:
            spread = mixed_skips(batch, num_layers)
            cases.append(Case(batch=batch, policy="mixed", forced_skips=spread))
        if compare:
            cases.append(Case(batch=batch, engine="transformers"))
    return cases


def mixed_skips(batch: int, num_layers: int) -> tuple[int, ...]:
    """How many blocks each row skips: from none to half of them, a quarter on average. No layer's
    weights go unread, so that this is the worst case of skipping in a batch."""
    return tuple(round(row * (num_layers // 2) / (batch - 1)) for row in range(batch))


def forced_layers(count: int, num_layers: int) -> range:
    """The `count` layers that a row is made to skip: a suffix before a cold end of one layer, as
    the adaptive rule skips; only when all of them are to be skipped, the last one too."""
    end = num_layers - (count < num_layers)
    return range(end - count, end)
