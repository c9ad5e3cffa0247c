"""The engine: schedule, run, update, in whoever's thread calls it."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from skipllm_core.config import EngineConfig
from skipllm_core.engine.block_manager import BlockManager, max_cached_tokens
from skipllm_core.engine.counts import count_tokens
from skipllm_core.engine.grammars import Grammars
from skipllm_core.engine.in_flight import StepInFlight, launch
from skipllm_core.engine.runner import (
    Batch,
    LateModelRunner,
    ModelRunner,
    RowResult,
    StepResult,
)
from skipllm_core.engine.scheduler import Scheduler
from skipllm_core.errors import ConfigError
from skipllm_core.sequence import SeqStatus, Sequence
from skipllm_core.tokenizer import HFTokenizer, Tokenizer
from skipllm_core.types import (
    EngineInfo,
    FinishReason,
    SamplingParams,
    SeqOutput,
    SkipUsage,
    StepKind,
    StepOutput,
    StepStats,
    num_rows_left_out,
)

logger = logging.getLogger(__name__)

# A forward that raises costs the sequences of its step. One that raises again and again (a broken
# device) costs the engine: whoever runs it starts a fresh one.
MAX_CONSECUTIVE_FAILURES = 3
GRAMMAR_WAIT_S = 0.02


class Engine:
    """Sequences in, one `StepOutput` per step out. Not thread-safe.

    `clock` gives seconds, on the clock of the arrival times. `load_tokenizer` is called, in a
    thread, for the first grammar; None: the tokenizer of the configuration's directory. Raises
    ConfigError if the settings contradict each other.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        max_model_len: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        load_tokenizer: Callable[[], Tokenizer] | None = None,
    ) -> None:
        if not 0 < config.max_num_seqs <= config.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({config.max_num_seqs}), and that at least 1"
            )
        self.info = EngineInfo(
            max_model_len=max_model_len,
            vocab_size=runner.vocab_size,
            num_layers=runner.num_layers,
            num_neurons=runner.num_neurons,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=runner.block_size,
            num_kv_blocks=runner.num_kv_blocks,
            device=runner.device,
            dtype=runner.dtype,
            num_parameters=runner.num_parameters,
            skip_policies=runner.skip_policies,
        )
        self._runner = runner
        self._in_flight: deque[StepInFlight] = deque()
        self._max_in_flight = 2 if isinstance(runner, LateModelRunner) else 1
        self._last_end_s = -float("inf")
        self._clock = clock
        self._blocks = BlockManager(
            runner.num_kv_blocks,
            runner.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            min_prefill_tokens=runner.min_prefill_tokens,
            needs_masks_first=self._max_in_flight > 1,
            clock=clock,
        )
        tokenizer_dir = config.tokenizer_dir or config.model_dir
        self._grammars = Grammars(
            load_tokenizer or partial(HFTokenizer, tokenizer_dir, eos_from=config.model_dir),
            runner.vocab_size,
        )
        self._seqs: dict[int, Sequence] = {}  # the unfinished ones
        self._num_failures: Counter[StepKind] = Counter()  # in a row; prefill may work, decode not

    @property
    def has_work(self) -> bool:
        return bool(self._seqs)  # without one, nobody waits for a step in flight

    def add(
        self,
        seq_id: int,
        prompt_ids: list[int],
        params: SamplingParams,
        arrival_s: float | None = None,
    ) -> None:
        """Queues a sequence that `EngineClient.submit` found to fit. `arrival_s` is when it came,
        by the clock; None: now."""
        most = max_cached_tokens(len(prompt_ids), params.max_tokens, self.info.max_model_len)
        assert seq_id not in self._seqs, "sequence ids are not reused"
        assert params.max_tokens >= 0
        assert len(prompt_ids) + min(1, params.max_tokens) <= self.info.max_model_len
        assert self._blocks.num_blocks_for(most) <= self._blocks.num_blocks
        if arrival_s is None:
            arrival_s = self._clock()
        seq = self._seqs[seq_id] = Sequence(
            seq_id, prompt_ids, params, arrival_s, self.info.max_model_len
        )
        if params.grammar is None:
            self._scheduler.add(seq)
        else:
            self._grammars.add(seq)

    def abort(self, seq_id: int) -> None:
        """Ends a sequence wherever it is, without a word; nothing if it has ended by itself."""
        if (seq := self._seqs.pop(seq_id, None)) and not self._grammars.discard(seq):
            self._scheduler.remove(seq)

    def step(self) -> StepOutput | None:
        """Computes one batch; None when there is no work, or none yet: while all sequences wait
        for their grammars it returns after GRAMMAR_WAIT_S, so that commands are heard.

        If the forward raises, the sequences of its batch end with "error" and the rest go on; the
        exception passes when MAX_CONSECUTIVE_FAILURES steps of one kind fail in a row.
        """
        refused = self._admit_compiled()
        while True:
            while self._may_launch and (step := self._launch()) is not None:
                self._in_flight.append(step)
            if not self._in_flight:
                if refused:
                    return StepOutput(outputs=refused, stats=None)
                if not self._seqs or not self._grammars.wait(GRAMMAR_WAIT_S):
                    return None
                refused = self._admit_compiled()
                continue
            step = self._in_flight.popleft()
            if not step.is_dropped:
                break
        result = self._read(step)
        # Rows that ended in flight were computed in vain, and count for nothing; so were those
        # whose mask was late, which are computed again.
        rows = []
        for row, row_result in zip(step.batch.rows, result.rows, strict=True):
            if row_result.is_late:
                row.seq.num_pending_tokens -= 1
                row.seq.num_computed_tokens -= 1
            elif row.seq.status is not SeqStatus.FINISHED:
                rows.append((row, row_result))
        batch = Batch(step.batch.kind, tuple(row for row, _ in rows))
        result = replace(result, rows=tuple(row_result for _, row_result in rows))
        outputs = self._update(batch, result)
        end_s = self._clock()
        duration_s = end_s - max(step.start_s, self._last_end_s)
        self._last_end_s = end_s
        return StepOutput(
            outputs=refused + outputs, stats=self._stats(step, batch, result, outputs, duration_s)
        )

    def _admit_compiled(self) -> tuple[SeqOutput, ...]:
        """Hands the sequences whose grammars are compiled to the scheduler; returns the ends of
        those that have none."""
        refused = []
        for seq, fault in self._grammars.pop_compiled():
            if fault is None:
                self._scheduler.add(seq)
                continue
            del self._seqs[seq.seq_id]
            refused.append(
                SeqOutput(
                    seq_id=seq.seq_id,
                    finish_reason="error",
                    error=fault.message,
                    is_request_fault=not fault.is_ours,
                )
            )
        return tuple(refused)

    @property
    def _may_launch(self) -> bool:
        return len(self._in_flight) < self._max_in_flight and not any(
            step.batch.kind == "prefill" for step in self._in_flight
        )

    def _launch(self) -> StepInFlight | None:
        """Launches the next step and moves its sequences on; for a runner that does not read late,
        the step is computed here."""
        start_s = self._clock()
        scheduler = self._scheduler
        batch = scheduler.schedule()
        if batch is None:
            return None
        read = launch(self._runner, batch)
        is_sampled = [row.samples for row in batch.rows]
        for row, samples in zip(batch.rows, is_sampled, strict=True):
            row.seq.num_computed_tokens += row.num_tokens
            row.seq.num_pending_tokens += samples
        return StepInFlight(
            batch,
            read,
            start_s,
            self._clock() - start_s,
            scheduler.num_preemptions,
            scheduler.num_prefix_cache_queries,
            scheduler.num_prefix_cache_hits,
        )

    def _read(self, step: StepInFlight) -> StepResult:
        batch = step.batch
        try:
            result = step.read()
        except Exception:
            self._num_failures[batch.kind] += 1
            if self._num_failures[batch.kind] == MAX_CONSECUTIVE_FAILURES:
                raise
            logger.exception("a %s step failed with %d sequences", batch.kind, len(batch.rows))
            return StepResult(tuple(RowResult(None, error="the step failed") for _ in batch.rows))
        self._num_failures[batch.kind] = 0
        return result

    def _update(self, batch: Batch, result: StepResult) -> tuple[SeqOutput, ...]:
        outputs = []
        for row, row_result in zip(batch.rows, result.rows, strict=True):
            seq = row.seq
            if row_result.error is not None:
                self._blocks.withdraw(seq)
                outputs.append(
                    self._end(
                        seq,
                        "error",
                        error=row_result.error,
                        is_request_fault=row_result.is_request_fault,
                    )
                )
                continue
            if batch.kind == "decode":
                seq.num_skippable_tokens += 1
                seq.num_skipped_ffn_blocks += len(row_result.skipped_layers)
                seq.num_left_out_neuron_rows += num_rows_left_out(row_result.neurons)
            else:
                self._blocks.publish(seq)
                _tell_prompt(seq, row_result)
            if row_result.token_id is not None:
                seq.num_pending_tokens -= 1
                outputs.append(self._extend(seq, row_result))
            elif seq.is_prompt_only and seq.num_computed_tokens == seq.num_prompt_tokens:
                outputs.append(self._end(seq, "length", self._output(seq, row_result)))
            elif row_result.prompt_logprobs:
                outputs.append(self._output(seq, row_result))
        # Those that took a token, and no others: a preempted row may be computed anew while its
        # mask is being made, and nobody may make it twice.
        self._grammars.move_on(
            [
                row.seq
                for row, row_result in zip(batch.rows, result.rows, strict=True)
                if row_result.token_id is not None and row.seq.awaits_mask
            ]
        )
        return tuple(outputs)

    def _output(self, seq: Sequence, row: RowResult) -> SeqOutput:
        is_at_first = seq.num_output_tokens == 1 or (
            seq.is_prompt_only and seq.num_computed_tokens == seq.num_prompt_tokens
        )
        has_token = row.token_id is not None
        return SeqOutput(
            seq_id=seq.seq_id,
            token_ids=() if row.token_id is None else (row.token_id,),
            logprobs=() if row.logprobs is None else (row.logprobs,),
            prompt_logprobs=row.prompt_logprobs,
            skipped_layers=(row.skipped_layers,) if has_token and seq.skip.trace else (),
            skipped_neurons=(row.neurons,) if has_token and _traces_neurons(seq) else (),
            queue_s=seq.queue_s if is_at_first else None,
            num_cached_tokens=seq.num_cached_tokens if is_at_first else None,
            skip_usage=self._skip_usage(seq),
        )

    def _skip_usage(self, seq: Sequence) -> SkipUsage:
        return seq.skip_usage(self.info.num_layers, self.info.num_neurons)

    def _extend(self, seq: Sequence, row: RowResult) -> SeqOutput:
        """Appends the row's token, and ends the sequence if that was its last."""
        token_id, params = row.token_id, seq.params
        assert token_id is not None
        seq.token_ids.append(token_id)
        num_output_tokens = seq.num_output_tokens
        output = self._output(seq, row)
        grammar = seq.grammar
        if grammar is not None:
            if grammar.ends_with(token_id):
                return self._end(seq, "stop", output, stop_token_id=token_id)
            grammar.accept(token_id)
            if grammar.is_complete:
                return self._end(seq, "stop", output)
        # The sampler does not let a stop token come before `min_tokens` others.
        elif token_id in params.stop_token_ids and num_output_tokens > params.min_tokens:
            return self._end(seq, "stop", output, stop_token_id=token_id)
        if seq.num_tokens == seq.max_num_tokens:
            return self._end(seq, "length", output)
        return output

    def _end(
        self,
        seq: Sequence,
        reason: FinishReason,
        output: SeqOutput | None = None,
        *,
        stop_token_id: int | None = None,
        error: str | None = None,
        is_request_fault: bool = False,
    ) -> SeqOutput:
        """Drops the sequence; its last output is `output` with the ending added."""
        del self._seqs[seq.seq_id]
        self._scheduler.remove(seq)
        return replace(
            output or SeqOutput(seq_id=seq.seq_id),
            finish_reason=reason,
            stop_token_id=stop_token_id,
            error=error,
            is_request_fault=is_request_fault,
            skip_usage=self._skip_usage(seq),
            num_preemptions=seq.num_preemptions,
        )

    def _stats(
        self,
        step: StepInFlight,
        batch: Batch,
        result: StepResult,
        outputs: tuple[SeqOutput, ...],
        duration_s: float,
    ) -> StepStats:
        counts = count_tokens(batch, result, self.info.num_layers)
        return StepStats(
            kind=batch.kind,
            duration_s=duration_s,
            host_s=step.host_s if self._max_in_flight > 1 else 0.0,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + self._grammars.num_compiling,
            num_kv_blocks_used=self._blocks.num_used,
            num_kv_blocks=self._blocks.num_blocks,
            num_prompt_tokens=counts.num_prompt_tokens,
            num_generated_tokens=sum(len(output.token_ids) for output in outputs),
            num_preemptions=step.num_preemptions,
            num_prefix_cache_queries=step.num_prefix_cache_queries,
            num_prefix_cache_hits=step.num_prefix_cache_hits,
            ffn_computed=counts.ffn_computed,
            ffn_skipped=counts.ffn_skipped,
            neurons_skipped_before_up=tuple(up for up, _ in counts.neurons),
            neurons_skipped_before_down=tuple(down for _, down in counts.neurons),
            ffn_weight_reads=result.ffn_weight_reads,
            ffn_weight_reads_avoided=result.ffn_weight_reads_avoided,
        )


def _traces_neurons(seq: Sequence) -> bool:
    return seq.skip.trace and seq.skip.policy == "neurons"


def _tell_prompt(seq: Sequence, row: RowResult) -> None:
    """Counts what a prefill step computed of the prompt for the first time."""
    num_computed = min(seq.num_computed_tokens, seq.num_prompt_tokens)
    seq.num_told_prompt_tokens = max(seq.num_told_prompt_tokens, num_computed)
    if (skips := row.prompt_skips) is not None:
        seq.num_skippable_tokens += skips.num_tokens
        seq.num_skipped_ffn_blocks += sum(skips.num_skipping)
        seq.num_left_out_neuron_rows += num_rows_left_out(skips.neurons)
