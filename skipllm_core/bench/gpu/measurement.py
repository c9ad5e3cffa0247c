"""What `skipllm bench gpu` tells: measured steps, and everything else as facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

GpuPolicy = Literal[
    "never",
    "gate only",
    "forced",
    "ffn_skip",
    "mixed",
    "neurons",
    "neurons together",
    "if nodes",
    "transformers eager",
    "transformers static",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMeasurement:
    """One measured step and one line of the JSON; ratios to the `never` of the same case."""

    model: str
    device: str
    dtype: str
    quantization: str
    policy: GpuPolicy
    batch: int
    context: int
    ms_per_step: float
    tokens_per_s: float
    skipped_blocks: float | None = None  # by a row, on average; of neurons, in blocks' worth
    ceiling_share: float | None = None
    speedup_vs_never: float | None = None
    token_skip_ratio: float | None = None
    weight_skip_ratio: float | None = None
    # Where rows differ: what the step was seen to save, and what the blocks that all rows skip are
    # worth by the fit of the forced masks; for `mixed` by their expected number. Where neurons are
    # left out: against the same kernels with all of them, and the weights that no row wants.
    saved_ms: float | None = None
    expected_saved_ms: float | None = None

    @property
    def case(self) -> tuple[str, str, int, int]:
        return self.model, self.weights, self.batch, self.context

    @property
    def weights(self) -> str:
        return self.dtype if self.quantization == "none" else self.quantization


@dataclass(frozen=True, slots=True)
class Told:
    """What is no measurement of a step: a speed, a fit, or why something was left out. `facts`
    go to the JSON."""

    text: str
    facts: Mapping[str, str | float] = field(default_factory=dict)


Item: TypeAlias = GpuMeasurement | Told
