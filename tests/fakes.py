"""Stand-ins that make every property of the engine and the server a fast test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from weakref import WeakKeyDictionary

from skipllm_core.config import EngineConfig
from skipllm_core.engine.engine import Engine
from skipllm_core.engine.runner import (
    Batch,
    PromptSkips,
    RowResult,
    ScheduledSeq,
    StepResult,
)
from skipllm_core.errors import ConfigError
from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import Tokenizer
from skipllm_core.types import (
    ROWS_PER_NEURON,
    LayerNeurons,
    SkipPolicyName,
    TokenLogprobs,
    num_rows_left_out,
    sum_by_layer,
)

NextToken = Callable[[Sequence], int]


def count_up(seq: Sequence) -> int:
    """The token after the last one, within the printable bytes: a text one can predict."""
    return 32 + (seq.token_ids[-1] - 31) % 95


class FakeRunner:
    """A model of no weights: the next token is a function of the sequence.

    Its KV cache holds, for every token, a hash of what real K/V depend on: the tokens up to it, and
    which of them were decoded with skipping. Every row checks that it reads back its own: a block
    that is missing, stale, or another prompt's fails the step.

    Skips as told: after the warm-up, every decode step of a sequence whose policy is not `never`
    skips the last `num_skipped` layers of its skippable region, and so does what counts as decoded;
    under `neurons` it leaves out of layer l, (l + before up, before down) of its `num_neurons`.
    A prompt's log-probabilities are `prompt_logprob`. `fail` may raise, sleep or look.
    """

    def __init__(
        self,
        next_token: NextToken = count_up,
        *,
        num_layers: int = 4,
        vocab_size: int = 320,
        num_kv_blocks: int = 256,
        block_size: int = 16,
        num_skipped: int = 1,
        neurons: tuple[int, int] = (3, 1),
        skip_policies: tuple[SkipPolicyName, ...] = get_args(SkipPolicyName),
        step_s: float = 0.0,
        min_prefill_tokens: int = 8,
        fail: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.num_layers = num_layers
        self.num_neurons = 16
        self.vocab_size = vocab_size
        self.num_kv_blocks = num_kv_blocks
        self.block_size = block_size
        self.device = "cpu"
        self.dtype = "float32"
        self.num_parameters = 0
        self.min_prefill_tokens = min_prefill_tokens
        self.skip_policies = skip_policies
        self.batches: list[Batch] = []
        self._cache = [[0] * block_size for _ in range(num_kv_blocks)]
        self._contents: WeakKeyDictionary[Sequence, list[int]] = WeakKeyDictionary()
        self._next_token = next_token
        self._num_skipped = num_skipped
        self._neurons = neurons
        self._step_s = step_s
        self._fail = fail

    def run(self, batch: Batch) -> StepResult:
        self._fail(batch)
        self.batches.append(batch)
        if self._step_s:
            time.sleep(self._step_s)
        rows = tuple(self._row(batch, row) for row in batch.rows)
        if batch.kind == "prefill":
            return StepResult(rows)
        common = set(range(self.num_layers)).intersection(*(row.skipped_layers for row in rows))
        avoided = float(len(common))
        if all(row.neurons for row in rows):  # they leave the same ones out
            avoided += num_rows_left_out(rows[0].neurons) / (ROWS_PER_NEURON * self.num_neurons)
        return StepResult(rows, self.num_layers - avoided, avoided)

    def _row(self, batch: Batch, row: ScheduledSeq) -> RowResult:
        seq = row.seq
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + row.num_tokens
        content = self._content(seq)
        for i in range(start, end):
            self._cache[seq.block_table[i // self.block_size]][i % self.block_size] = content[i]
        found = [cell for block in seq.block_table for cell in self._cache[block]]
        assert found[:end] == content[:end], "a corrupt KV cache"
        skipped: tuple[int, ...] = ()
        neurons: LayerNeurons = ()
        is_decode = batch.kind == "decode"
        if is_decode and seq.skip.policy != "never" and not seq.is_warming_up:
            skipped, neurons = self._skipped(seq), self._left_out(seq)
        if seq.grammar is not None and row.samples:
            seq.grammar.mask()  # whoever samples waits for it
            if seq.grammar.error is not None:
                return RowResult(None, error=seq.grammar.error, is_request_fault=True)
        return RowResult(
            self._next_token(seq) if row.samples else None,
            skipped_layers=skipped,
            neurons=neurons,
            prompt_logprobs=() if is_decode else _prompt_logprobs(row),
            prompt_skips=self._prompt_skips(row) if seq.skip.prompt and not is_decode else None,
        )

    def _skipped(self, seq: Sequence) -> tuple[int, ...]:
        return tuple(range(seq.skip.cold_start, seq.skip.cold_end))[-self._num_skipped :]

    def _left_out(self, seq: Sequence) -> LayerNeurons:
        if seq.skip.policy != "neurons":
            return ()
        before_up, before_down = self._neurons
        return tuple((layer + before_up, before_down) for layer in range(self.num_layers))

    def _prompt_skips(self, row: ScheduledSeq) -> PromptSkips:
        seq = row.seq
        positions = [position for position in row.new_prompt_tokens if position]
        num_skipping = sum(position >= max(1, seq.skip.warmup_tokens) for position in positions)
        skipped = self._skipped(seq)
        return PromptSkips(
            len(positions),
            tuple(num_skipping * (layer in skipped) for layer in range(self.num_layers)),
            sum_by_layer([self._left_out(seq)] * num_skipping),
        )

    def _content(self, seq: Sequence) -> list[int]:
        """What the cache has to hold of the sequence's tokens."""
        content = self._contents.setdefault(seq, [])
        warmup_tokens = max(1, seq.skip.warmup_tokens)
        for i in range(len(content), seq.num_tokens):
            can_skip = seq.skip.policy != "never" and i - seq.num_given_tokens + 1 >= warmup_tokens
            content.append(hash((content[i - 1] if i else 0, seq.token_ids[i], can_skip)))
        return content


def prompt_logprob(position: int, token_id: int, num_top: int) -> TokenLogprobs:
    """Of the prompt token there: the second best, behind token 7."""
    tops = [(7, -0.25), (token_id, -position / 4), (300, -30.0)][:num_top]
    ids, values = zip(*tops, strict=True) if tops else ((), ())
    return TokenLogprobs(-position / 4, ids, values, rank=2)


def _prompt_logprobs(row: ScheduledSeq) -> tuple[TokenLogprobs, ...]:
    seq, num_top = row.seq, row.seq.params.prompt_logprobs
    if num_top is None:
        return ()
    following = [p + 1 for p in row.new_prompt_tokens if p + 1 < seq.num_prompt_tokens]
    return tuple(prompt_logprob(p, seq.token_ids[p], num_top) for p in following)


def fake_engine(
    runner: FakeRunner | None = None,
    *,
    max_model_len: int = 512,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 2048,
    enable_prefix_caching: bool = True,
    clock: Callable[[], float] = time.monotonic,
    load_tokenizer: Callable[[], Tokenizer] | None = None,
) -> Engine:
    """An engine around a fake runner."""
    config = EngineConfig(
        model_dir=Path(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
    return Engine(
        runner or FakeRunner(), config, max_model_len, clock=clock, load_tokenizer=load_tokenizer
    )


def build_worker_engine(config: EngineConfig) -> Engine:
    """What the worker processes of the tests build: steps of 5 ms, and faults told by files.

    In the model's directory: `refuse` and `die` spoil the start, `raise` and `hang` every step.
    """

    def has(fault: str) -> bool:
        return (config.model_dir / fault).exists()

    def fail(batch: Batch) -> None:
        if has("raise"):
            raise RuntimeError("told to raise")
        while has("hang"):
            time.sleep(0.05)

    if has("refuse"):
        raise ConfigError("told to refuse")
    if has("die"):
        os._exit(3)
    return Engine(FakeRunner(step_s=0.005, fail=fail), config, max_model_len=512)
