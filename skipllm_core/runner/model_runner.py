"""The torch implementation of `ModelRunner`: one model, one device, one KV cache."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import get_args

import torch
from torch import Tensor

from skipllm_core.config import Device, EngineConfig
from skipllm_core.engine.runner import Batch, RowResult, ScheduledSeq, StepResult
from skipllm_core.errors import ConfigError
from skipllm_core.kernels.cpu import CpuDecoder, is_available
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.config import load_model_config
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.loader import load_model, resolve_dtype
from skipllm_core.runner.decode import cpu_forward, gated_forward, head_of
from skipllm_core.runner.memory import (
    SEGMENT_BYTES,
    cpu_budget_bytes,
    cuda_budget_bytes,
    mib,
    tells_what_to_lower,
)
from skipllm_core.runner.prompts import Head, prompt_skips, score, score_prompts
from skipllm_core.runner.sampler import NOT_FINITE, sample
from skipllm_core.sequence import Sequence
from skipllm_core.skip.consensus import ConsensusGate
from skipllm_core.skip.policy import SkipGate, gate_for, skip_at, weight_reads_avoided
from skipllm_core.types import SamplingParams, SkipPolicyName

logger = logging.getLogger(__name__)

# Tokens up to which the CPU's kernels compute a prompt's step faster than torch's products do
# (`skipllm bench prefill`).
KERNEL_PREFILL_TOKENS = 32

DEAREST_SAMPLING = SamplingParams(max_tokens=1, top_p=0.9, repetition_penalty=1.1, logprobs=0)


class TorchModelRunner:
    """Computes batches with a checkpoint's model: decode steps and short prompts with the device's
    own kernels where there are some, everything else with torch's operators.

    Raises ConfigError when the device, the model or the KV cache cannot be had.
    """

    skip_policies: tuple[SkipPolicyName, ...] = get_args(SkipPolicyName)

    @tells_what_to_lower
    @torch.inference_mode()
    def __init__(self, config: EngineConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device = resolve_device(config.device)
        if config.quantization == "fp8" and device.type != "cuda":
            raise ConfigError("--quantization fp8 needs a CUDA device: on the CPU, use int8")
        dtype = resolve_dtype(load_model_config(config.model_dir), device, config.dtype)
        self.model = load_model(
            config.model_dir,
            device=device,
            dtype=dtype,
            load_format=config.load_format,
            quantization=config.quantization,
            seed=config.seed,
        )
        self.device = str(device)
        self.dtype = str(dtype).removeprefix("torch.")
        self.num_layers = self.model.config.num_layers
        self.num_neurons = self.model.config.intermediate_size
        self.vocab_size = self.model.config.vocab_size
        self.num_parameters = self.model.num_parameters
        self.block_size = config.block_size
        self._device = device
        self._consensus = config.consensus
        self._dtype = dtype
        self.max_model_len, self.num_kv_blocks = self._cache_size(config)
        self.kv_cache = self._new_cache(self.num_kv_blocks)
        self.cpu_decoder = self._new_cpu_decoder(config)
        # torch's products take as long over fewer tokens as over these, all devices alike.
        self.min_prefill_tokens = 64 if self.cpu_decoder is None else 8

    @torch.inference_mode()
    def run(self, batch: Batch, gate: SkipGate | None = None) -> StepResult:
        """Computes the batch; `gate` stands in for the one that the rows' settings give.

        A row of the gate is a token. Output tokens that a preemption made part of a prefill are
        decoded again under the rule they were decoded under: their K and V come out the same.
        """
        gate = gate or self._gate(batch)
        head = self.forward(batch.rows, gate)
        sampling = [row.seq for row in batch.rows if row.samples]
        sampled = iter(sample(head(_last_places(batch.rows)), sampling) if sampling else ())
        ends = accumulate(row.num_tokens for row in batch.rows)
        rows = [
            replace(
                next(sampled),
                skipped_layers=tuple(gate.skipped_layers[end - 1]),
                neurons=tuple(gate.neurons.counts[end - 1]),
            )
            if row.samples
            else RowResult(None)
            for row, end in zip(batch.rows, ends, strict=True)
        ]
        if batch.kind == "prefill":
            return StepResult(tuple(self._with_prompts(batch.rows, rows, head, gate)))
        avoided = weight_reads_avoided(gate, self.num_neurons)
        return StepResult(tuple(rows), self.num_layers - avoided, avoided)

    def _with_prompts(
        self, rows: Rows[ScheduledSeq], results: Rows[RowResult], head: Head, gate: SkipGate
    ) -> Iterator[RowResult]:
        """The results of a prefill, and what it tells of the prompts."""
        first = 0
        for row, result, logprobs in zip(rows, results, score_prompts(rows, head), strict=True):
            if any(math.isnan(found.logprob) for found in logprobs):
                yield RowResult(None, error=NOT_FINITE)
            else:
                skips = prompt_skips(row, first, gate, self.num_layers)
                yield replace(result, prompt_logprobs=logprobs, prompt_skips=skips)
            first += row.num_tokens

    def _gate(self, batch: Batch) -> SkipGate:
        skips = [
            skip_at(row.seq, position)
            for row in batch.rows
            for position in range(_start(row), _start(row) + row.num_tokens)
        ]
        # What a consensus decided depended on rows that are gone: a prefill cannot repeat it.
        if self._consensus is not None and batch.kind == "decode" and any(skips):
            return ConsensusGate(skips, share=self._consensus.share, slack=self._consensus.slack)
        return gate_for(skips)

    @torch.inference_mode()
    def logits(self, rows: Rows[ScheduledSeq], gate: SkipGate) -> Tensor:
        """Computes the rows' scheduled tokens, under a gate with one row per token. Returns the
        logits [num_sampling_rows, vocab] that the rows which sample have to sample from."""
        return self.forward(rows, gate)(_last_places(rows))

    @torch.inference_mode()
    def forward(self, rows: Rows[ScheduledSeq], gate: SkipGate) -> Head:
        """Computes the rows' scheduled tokens, under a gate with one row per token. What it returns
        gives the logits of any of them, until the next step."""
        places = [
            (row.seq, position)
            for row in rows
            for position in range(_start(row), _start(row) + row.num_tokens)
        ]
        tokens = [seq.token_ids[position] for seq, position in places]
        if (decoder := self._decoder_for(len(rows), len(tokens), gate)) is not None:
            cpu_forward(
                decoder,
                tokens,
                [position for _, position in places],
                [seq.block_table for seq, _ in places],
                gate,
            )
            return lambda chosen: decoder.logits(list(chosen))
        context_rows = [
            ContextRow(_start(row), row.num_tokens, row.seq.block_table) for row in rows
        ]
        ctx = self.model.context(context_rows, self.kv_cache)
        token_ids = torch.tensor(tokens, device=self._device)
        h = gated_forward(self.model, token_ids, ctx, gate)
        return partial(head_of, self.model, h)

    def _decoder_for(self, num_rows: int, num_tokens: int, gate: SkipGate) -> CpuDecoder | None:
        """The kernels, where they can run a step over these and do it faster than torch."""
        if self.cpu_decoder is None or gate.whole_layer_rows:
            return None
        is_decode = num_tokens == num_rows
        most = self.cpu_decoder.max_num_rows if is_decode else KERNEL_PREFILL_TOKENS
        return self.cpu_decoder if num_tokens <= most else None

    def _new_cpu_decoder(self, config: EngineConfig) -> CpuDecoder | None:
        is_wanted = self._device.type == "cpu" and not config.enforce_eager
        if not is_wanted or self._dtype != torch.float32:
            return None
        if not is_available():
            logger.warning(
                "decoding with torch alone, at a fraction of the speed: the CPU kernels were not "
                "built when skipllm was installed. Install a C compiler, and skipllm again"
            )
            return None
        return CpuDecoder(
            self.model,
            self.kv_cache,
            max_num_rows=max(config.max_num_seqs, KERNEL_PREFILL_TOKENS),
            max_model_len=self.max_model_len,
            num_threads=torch.get_num_threads(),
        )

    # Sizing the KV cache -------------------------------------------------------------------------

    def _cache_size(self, config: EngineConfig) -> tuple[int, int]:
        """(max_model_len, num_kv_blocks): never more blocks than max_num_seqs sequences can use."""
        trained_len = self.model.config.max_position_embeddings
        max_model_len = config.max_model_len or trained_len
        if max_model_len > trained_len:
            raise ConfigError(
                f"--max-model-len {max_model_len} is beyond the {trained_len} positions that the "
                "model was made for"
            )
        block_bytes = KVCache.block_bytes(
            self.model.config, block_size=self.block_size, dtype=self._dtype
        )
        budget = config.kv_cache_memory_bytes
        if budget is None:
            budget = self._free_bytes(config, max_model_len)
        num_blocks = min(
            budget // block_bytes, config.max_num_seqs * self._num_blocks_for(max_model_len)
        )
        if num_blocks >= self._num_blocks_for(max_model_len):
            return max_model_len, num_blocks
        if num_blocks < 1 or config.max_model_len is not None:
            needed = self._num_blocks_for(max_model_len) * block_bytes
            more = "--kv-cache-memory"
            if self._device.type == "cuda":
                more += " or --gpu-memory-utilization"
            raise ConfigError(
                f"one sequence of {max_model_len} tokens needs {mib(needed)} of KV cache, but it "
                f"may take {mib(max(0, budget))}: raise {more}, or lower --max-model-len"
            )
        fitting = num_blocks * self.block_size
        logger.warning(
            "the context is cut from %d to %d tokens: more do not fit into the KV cache of %s",
            max_model_len,
            fitting,
            mib(budget),
        )
        return fitting, num_blocks

    def _free_bytes(self, config: EngineConfig, max_model_len: int) -> int:
        if self._device.type == "cpu":
            return cpu_budget_bytes()
        budget = cuda_budget_bytes(
            self._device,
            config.gpu_memory_utilization,
            lambda: self._run_largest_step(config, max_model_len),
        )
        rounding = 2 * self.num_layers * SEGMENT_BYTES  # K and V of each layer
        return budget - rounding - self._decode_bytes(config, max_model_len)

    def _decode_bytes(self, config: EngineConfig, max_model_len: int) -> int:
        """What decode steps keep on the device beside the cache."""
        return 0

    def _run_largest_step(self, config: EngineConfig, max_model_len: int) -> None:
        """A prefill of as many tokens as a step may have, at the end of the longest context, and
        the dearest sampling of as many rows as there may be. All context lies in one block."""
        num_tokens = min(config.max_num_batched_tokens, max_model_len)
        num_rows = config.max_num_batched_tokens // num_tokens
        table = [0] * self._num_blocks_for(max_model_len)
        rows = [ContextRow(max_model_len - num_tokens, num_tokens, table)] * num_rows
        ctx = self.model.context(rows, self._new_cache(1))
        token_ids = torch.zeros(num_rows * num_tokens, dtype=torch.int64, device=self._device)
        head = partial(head_of, self.model, self.model(token_ids, ctx))
        places = range(len(token_ids))
        score(head, places, [0] * len(places), num_top=1)
        logits = head(places[: config.max_num_seqs])
        sample(logits, [Sequence(0, [0], DEAREST_SAMPLING) for _ in logits])

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _new_cache(self, num_blocks: int) -> KVCache:
        try:
            return KVCache(
                self.model.config,
                num_blocks=num_blocks,
                block_size=self.block_size,
                dtype=self._dtype,
                device=self._device,
            )
        except torch.OutOfMemoryError:
            raise  # a device's: there is more that can be lowered
        except (MemoryError, RuntimeError) as error:  # torch's CPU allocator raises RuntimeError
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"the KV cache does not fit into memory, lower --kv-cache-memory: {reason}"
            ) from error


def resolve_device(device: Device) -> torch.device:
    """The torch device meant; `auto` is CUDA where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def _last_places(rows: Rows[ScheduledSeq]) -> list[int]:
    """Of the rows that sample, among the flat tokens."""
    ends = accumulate(row.num_tokens for row in rows)
    return [end - 1 for row, end in zip(rows, ends, strict=True) if row.samples]


def _start(row: ScheduledSeq) -> int:
    return row.seq.num_computed_tokens
