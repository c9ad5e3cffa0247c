"""The seam between the engine (no torch) and what computes: `ModelRunner`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from skipllm_core.sequence import Sequence
from skipllm_core.types import LayerNeurons, SkipPolicyName, StepKind, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """A sequence and how many of its tokens this step computes, from `num_computed_tokens` on."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one is sampled."""
        seq = self.seq
        end = seq.num_computed_tokens + self.num_tokens
        return not seq.is_prompt_only and end == seq.num_tokens + seq.num_pending_tokens

    @property
    def new_prompt_tokens(self) -> range:
        """Positions of the prompt's tokens that this step computes and none did before."""
        seq = self.seq
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + self.num_tokens
        return range(max(start, seq.num_told_prompt_tokens), min(end, seq.num_prompt_tokens))


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes. Block tables already have room for every scheduled token."""

    kind: StepKind
    rows: tuple[ScheduledSeq, ...]


@dataclass(frozen=True, slots=True)
class PromptSkips:
    """What skipping did to tokens of a prompt under `skip.prompt`: the new ones of a step, but not
    the prompt's first."""

    num_tokens: int
    num_skipping: tuple[int, ...]  # per layer
    neurons: LayerNeurons = ()  # sums over the tokens


@dataclass(frozen=True, slots=True)
class RowResult:
    """What the step made of one row. `token_id` is None where the prompt is not finished, and where
    nothing is to be generated."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    skipped_layers: tuple[int, ...] = ()  # of the row's last token,
    neurons: LayerNeurons = ()  # and what it left out of the layers that it ran
    # Of the tokens that follow `new_prompt_tokens` in the prompt, where the sequence asks for them.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_skips: PromptSkips | None = None
    error: str | None = None  # this row alone failed (its logits were not finite)
    is_request_fault: bool = False  # the error is the request's: its grammar is at a dead end
    is_late: bool = False  # nothing was sampled, as the grammar's mask was not there in time


@dataclass(frozen=True, slots=True)
class StepResult:
    """One `RowResult` per row of the batch, in its order, and how many layers' worth of FFN weights
    the step read and did not read (decode only)."""

    rows: tuple[RowResult, ...]
    ffn_weight_reads: float = 0.0
    ffn_weight_reads_avoided: float = 0.0


class ModelRunner(Protocol):
    """Computes batches. Implementations: the torch runner, and the fake one of the tests."""

    num_layers: int
    num_neurons: int  # of a layer's FFN: its intermediate size
    vocab_size: int
    num_kv_blocks: int
    block_size: int
    device: str  # "cpu", "cuda:0"
    dtype: str  # "float32", "bfloat16"
    num_parameters: int
    skip_policies: tuple[SkipPolicyName, ...]  # that it can run
    min_prefill_tokens: int  # a prefill step of fewer takes hardly less time

    def run(self, batch: Batch) -> StepResult: ...


@runtime_checkable
class LateModelRunner(ModelRunner, Protocol):
    """A runner whose steps take place on a device, in the order of their launches.

    `launch` returns before the step is computed; what it returns waits for the results. Everything
    that the step needs of the sequences is read before `launch` returns, as the engine moves them
    on. A decode row may be launched while its input token is pending (`num_pending_tokens`): the
    step takes it from the device, where the step before it, launched for the same sequence, left
    it. Results that nobody waits for are dropped.
    """

    def launch(self, batch: Batch) -> Callable[[], StepResult]: ...
