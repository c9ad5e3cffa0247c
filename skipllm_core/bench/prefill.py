"""Prefills of the engine's runner, timed: one prompt at a time, in turn with transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from skipllm_core.bench.bandwidth import synchronize
from skipllm_core.bench.decode import OnProgress, no_progress
from skipllm_core.bench.measurement import percentile
from skipllm_core.bench.sequences import prefill
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.types import SamplingParams

if TYPE_CHECKING:
    from skipllm_core.bench.compare import TransformersModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillMeasurement:
    """One prompt, from its token ids to the first token of the answer; times are medians."""

    engine: str
    num_tokens: int
    chunk_tokens: int  # that a step computes at most; transformers computes all in one
    rounds: int
    ms_per_prefill: float
    ms_per_prefill_p10: float
    ms_per_prefill_p90: float
    tokens_per_s: float
    speedup_vs_transformers: float | None
    token_equals_transformers: bool | None


def bench_prefill(
    runner: TorchModelRunner,
    prompts: Sequence[list[int]],
    *,
    rounds: int,
    chunk_tokens: int,
    transformers_model: TransformersModel | None = None,
    on_progress: OnProgress = no_progress,
) -> list[PrefillMeasurement]:
    """Each prompt `rounds` times, after one that is not counted. The cache has room for it."""
    measurements = []
    for at, prompt in enumerate(prompts):
        ours_s, theirs_s, tokens, their_tokens = [], [], set(), set()
        for number in range(rounds + 1):
            what = f"{len(prompt)} tokens"
            on_progress(what, at * (rounds + 1) + number, len(prompts) * (rounds + 1))
            seconds, token_id = _timed_prefill(runner, prompt, chunk_tokens)
            ours_s.append(seconds)
            tokens.add(token_id)
            if transformers_model is not None:
                seconds, token_id = transformers_model.prefill(prompt)
                theirs_s.append(seconds)
                their_tokens.add(token_id)
        engines = {"skipllm": ours_s[1:]}
        if theirs_s:
            engines["transformers"] = theirs_s[1:]
        for engine, seconds_of in engines.items():
            measurements.append(
                PrefillMeasurement(
                    engine=engine,
                    num_tokens=len(prompt),
                    chunk_tokens=chunk_tokens if engine == "skipllm" else len(prompt),
                    rounds=rounds,
                    ms_per_prefill=median(seconds_of) * 1e3,
                    ms_per_prefill_p10=percentile(seconds_of, 0.1) * 1e3,
                    ms_per_prefill_p90=percentile(seconds_of, 0.9) * 1e3,
                    tokens_per_s=len(prompt) / median(seconds_of),
                    speedup_vs_transformers=(
                        median(theirs_s[1:]) / median(seconds_of) if theirs_s else None
                    ),
                    token_equals_transformers=tokens == their_tokens if theirs_s else None,
                )
            )
    return measurements


def _timed_prefill(
    runner: TorchModelRunner, prompt: list[int], chunk_tokens: int
) -> tuple[float, int]:
    seq = Seq(0, prompt, SamplingParams(max_tokens=1, temperature=0.0))
    seq.block_table = list(range(-(-len(prompt) // runner.block_size)))
    synchronize(torch.device(runner.device))
    start = time.perf_counter()
    token_id = prefill(runner, seq, chunk_tokens)
    return time.perf_counter() - start, token_id
