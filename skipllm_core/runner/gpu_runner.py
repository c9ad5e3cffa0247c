"""Decode steps on the device from end to end, launched ahead of the results of the last one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from skipllm_core.config import EngineConfig
from skipllm_core.engine.runner import Batch, ScheduledSeq, StepResult
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy
from skipllm_core.model.kv_cache import KVCache
from skipllm_core.model.llama import LlamaModel
from skipllm_core.runner.device_sampler import DeviceSampler, sampling_kind
from skipllm_core.runner.graphs import (
    Capture,
    CudaCapture,
    DecodeGraphs,
    Decoder,
    reserve_bytes,
)
from skipllm_core.runner.memory import allocated_bytes, held_tensors, tells_what_to_lower
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.runner.sampler import barred_by, row_result
from skipllm_core.runner.slots import Slots
from skipllm_core.sequence import Sequence
from skipllm_core.skip.baselines import WHOLE_LAYER_POLICIES, PlannedSkip
from skipllm_core.skip.policy import skip_at
from skipllm_core.types import TokenLogprobs

MakeDecoder = Callable[[LlamaModel, KVCache, DeviceRows], Decoder]

_NUM_FIELDS = 9  # of a packed row, before its block table


class GpuModelRunner(TorchModelRunner):
    """A `LateModelRunner`: prefill as its base class has it, decode steps by `DecodeGraphs`.

    The first token of a sequence is sampled and read by the prefill step, on the host's terms; all
    others are drawn on the device. Raises ConfigError as its base class does, and when the device's
    memory runs out.
    """

    # The others leave out attention, or neurons, which no kernel does.
    skip_policies = tuple(
        name
        for name in TorchModelRunner.skip_policies
        if name not in WHOLE_LAYER_POLICIES and name != "neurons"
    )

    @tells_what_to_lower
    @torch.inference_mode()
    def __init__(
        self,
        config: EngineConfig,
        make_decoder: MakeDecoder,
        make_capture: Callable[[], Capture] = CudaCapture,
    ) -> None:
        self._make_decoder = make_decoder
        super().__init__(config)
        self.rows = self._new_rows(config.max_num_seqs, self.max_model_len, self._device)
        if config.consensus is not None:
            numbers = [config.consensus.share, config.consensus.slack]
            self.rows.consensus.copy_(torch.tensor(numbers))
        self.sampler = DeviceSampler(self.rows)
        decoder = make_decoder(self.model, self.kv_cache, self.rows)
        self.graphs = DecodeGraphs(decoder, self.sampler, config.max_num_seqs, make_capture())
        self._slots = Slots()
        # Of each slot, as the device has them: its table's blocks, and its row of the mask.
        self._num_blocks = [0] * config.max_num_seqs
        self._masks: list[frozenset[int] | None] = [frozenset()] * config.max_num_seqs

    def _new_rows(self, max_num_rows: int, max_model_len: int, device: torch.device) -> DeviceRows:
        return DeviceRows(
            max_num_rows=max_num_rows,
            max_blocks=self._num_blocks_for(max_model_len),
            num_layers=self.num_layers,
            vocab_size=self.vocab_size,
            device=device,
        )

    def _decode_bytes(self, config: EngineConfig, max_model_len: int) -> int:
        """Of all buffers, exactly, made on no device to be counted; and a reserve for graphs."""
        nowhere = torch.device("meta")
        rows = self._new_rows(config.max_num_seqs, max_model_len, nowhere)
        cache = KVCache(
            self.model.config,
            num_blocks=0,
            block_size=self.block_size,
            dtype=self._dtype,
            device=nowhere,
        )
        decoder = self._make_decoder(self.model, cache, rows)
        buffers = (*held_tensors(rows), *held_tensors(DeviceSampler(rows)), *decoder.buffers)
        reserve = reserve_bytes(config.max_num_seqs, self.num_layers, self.vocab_size)
        return allocated_bytes(buffers) + reserve

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        if batch.kind == "prefill":
            result = self.run(batch)
            return lambda: result
        try:
            return self._launch_decode(batch)
        except Exception:
            self._slots = Slots()  # its rows end; no other is on the device
            self._masks = [None] * len(self._masks)  # who knows which of them were written
            raise

    def _launch_decode(self, batch: Batch) -> Callable[[], StepResult]:
        seqs = [row.seq for row in batch.rows]
        self._write_rows(seqs)
        slots = self._slots.slot_of(seqs)
        can_skip = any(skip_at(seq, seq.num_computed_tokens) is not None for seq in seqs)
        kind = sampling_kind(seq.params for seq in seqs)
        self.graphs.launch(len(seqs), can_skip=can_skip, kind=kind)
        rows = self.rows
        outputs = [self.sampler.results[: len(seqs)], rows.skipped[: len(seqs)], rows.num_needed]
        asking = [(slot, row) for slot, row in zip(slots, batch.rows, strict=True) if _asks(row)]
        if asking:
            outputs.extend(self._logprobs(asking))
        read = _copy_out(outputs)
        return lambda: _result(batch, slots, asking, read(), can_skip=can_skip)

    def _write_rows(self, seqs: list[Sequence]) -> None:
        """Brings the device's rows up to date: what changed, in one transfer (state of the sampler
        aside, once per sequence)."""
        changes = self._slots.change(seqs)
        rows = self.rows
        for source, slot in changes.moved:
            for tensor in _row_tensors(rows):
                tensor[slot].copy_(tensor[source])
            self.sampler.move(source, slot)
            self._num_blocks[slot] = self._num_blocks[source]
            self._masks[slot] = self._masks[source]
        if changes.is_padding_stale:
            rows.positions[len(seqs) :] = -1
        for slot, seq in changes.new:
            self.sampler.assign(slot, seq)
            self._num_blocks[slot] = len(seq.block_table)
        packed = [_packed(slot, seq, rows) for slot, seq in changes.new]
        for slot, seq in zip(self._slots.slot_of(seqs), seqs, strict=True):
            if self._num_blocks[slot] != len(seq.block_table):
                self._num_blocks[slot] = len(seq.block_table)
                packed.append(_packed(slot, seq, rows))
        if packed:
            self._unpack(_to_device(torch.tensor(packed, dtype=torch.int32), rows), changes.new)
        self._write_masks(seqs)
        self._write_grammars(seqs)

    def _write_masks(self, seqs: list[Sequence]) -> None:
        """What the planned policies skip in this step, where it is not what they skipped in the
        last one."""
        changed = {}
        for slot, seq in zip(self._slots.slot_of(seqs), seqs, strict=True):
            rule = skip_at(seq, seq.num_computed_tokens)
            layers = rule.layers if isinstance(rule, PlannedSkip) else frozenset()
            if layers != self._masks[slot]:
                self._masks[slot] = changed[slot] = layers
        if changed:
            mask = [
                [slot, *(layer in layers for layer in range(self.num_layers))]
                for slot, layers in changed.items()
            ]
            packed = _to_device(torch.tensor(mask, dtype=torch.int32), self.rows)
            self.rows.mask.index_copy_(0, packed[:, 0].long(), packed[:, 1:])

    def _write_grammars(self, seqs: list[Sequence]) -> None:
        """What the rows' grammars allow in this step: the engine launches none before its mask is
        made."""
        barred = {}
        for slot, seq in zip(self._slots.slot_of(seqs), seqs, strict=True):
            grammar = seq.grammar
            if grammar is not None and (mask := grammar.mask(timeout_s=0)) is not None:
                barred[slot] = barred_by(mask, self.vocab_size)
        if barred:
            slots = _to_device(torch.tensor(list(barred)), self.rows)
            packed = _to_device(torch.stack(list(barred.values())), self.rows)
            self.sampler.is_barred.index_copy_(0, slots, packed)

    def _unpack(self, packed: Tensor, new: tuple[tuple[int, Sequence], ...]) -> None:
        rows = self.rows
        rows.block_tables.index_copy_(0, packed[:, 0].long(), packed[:, _NUM_FIELDS:])
        if not new:
            return
        packed = packed[: len(new)]  # the others go on from what the device has
        slots = packed[:, 0].long()
        thresholds = packed[:, 4].contiguous().view(torch.float32)
        rows.thresholds.index_copy_(0, slots, thresholds)
        for field, tensor in (
            (1, rows.token_ids),
            (2, rows.positions),
            (3, rows.policies),
            (5, rows.skip_from),
            (6, rows.cold_starts),
            (7, rows.cold_ends),
            (8, rows.max_skips),
        ):
            tensor.index_copy_(0, slots, packed[:, field])

    def _logprobs(self, asking: list[tuple[int, ScheduledSeq]]) -> list[Tensor]:
        """Of the tokens just sampled, and the best of their positions."""
        index = _to_device(torch.tensor([slot for slot, _ in asking]), self.rows)
        count = min(max(row.seq.params.logprobs or 0 for _, row in asking), self.vocab_size)
        logprobs = self.rows.logits[index].log_softmax(dim=-1)
        chosen = logprobs.gather(1, self.sampler.results[index, :1].long())[:, 0]
        best = logprobs.topk(count, dim=-1)
        return [chosen, best.indices, best.values]


def _row_tensors(rows: DeviceRows) -> tuple[Tensor, ...]:
    return (
        rows.token_ids,
        rows.positions,
        rows.block_tables,
        rows.policies,
        rows.thresholds,
        rows.skip_from,
        rows.cold_starts,
        rows.cold_ends,
        rows.max_skips,
        rows.mask,
    )


def _packed(slot: int, seq: Sequence, rows: DeviceRows) -> list[int]:
    skip = seq.skip
    first = max(1, skip.warmup_tokens) + seq.num_given_tokens - 1
    policy = RowPolicy.NEVER
    if skip.policy in ("static", "random"):
        policy = RowPolicy.MASK
    elif skip_at(seq, first) is not None:
        policy = RowPolicy.FFN_SKIP
    (threshold,) = struct.unpack("=i", struct.pack("=f", skip.threshold))  # its bits
    table = seq.block_table
    return [
        slot,
        seq.token_ids[-1],
        seq.num_computed_tokens,
        policy,
        threshold,
        first,
        skip.cold_start,
        skip.cold_end,
        rows.num_layers if skip.max_skips is None else min(skip.max_skips, rows.num_layers),
        *table,
        *[0] * (rows.block_tables.shape[1] - len(table)),
    ]


def _to_device(tensor: Tensor, rows: DeviceRows) -> Tensor:
    if rows.device.type != "cuda":
        return tensor
    # Torch keeps the pinned memory until the copy is done, as it knows the stream.
    return tensor.pin_memory().to(rows.device, non_blocking=True)


def _copy_out(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Copies for the host as they stand at this point of the stream; the call waits for them."""
    if tensors[0].device.type != "cuda":
        copies = [tensor.clone() for tensor in tensors]
        return lambda: copies
    copies = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def read() -> list[Tensor]:
        event.synchronize()
        return copies

    return read


def _asks(row: ScheduledSeq) -> bool:
    return row.seq.params.logprobs is not None


def _result(
    batch: Batch,
    slots: list[int],
    asking: list[tuple[int, ScheduledSeq]],
    outputs: list[Tensor],
    *,
    can_skip: bool,
) -> StepResult:
    sampled, skipped, needed = (tensor.tolist() for tensor in outputs[:3])
    logprobs: dict[int, TokenLogprobs] = {}
    if asking:
        values = (tensor.tolist() for tensor in outputs[3:])
        for (slot, row), chosen, ids, best in zip(asking, *values, strict=True):
            count = row.seq.params.logprobs
            logprobs[slot] = TokenLogprobs(chosen, tuple(ids[:count]), tuple(best[:count]))
    seq_of = {slot: row.seq for slot, row in zip(slots, batch.rows, strict=True)}
    results = []
    for slot in slots:
        token_id, is_finite = sampled[slot]
        layers = tuple(layer for layer, is_skipped in enumerate(skipped[slot]) if is_skipped)
        result = row_result(seq_of[slot], token_id, logprobs.get(slot), is_finite=bool(is_finite))
        has_token = can_skip and result.token_id is not None
        results.append(replace(result, skipped_layers=layers if has_token else ()))
    num_layers = len(needed)
    num_avoided = sum(num_rows == 0 for num_rows in needed) if can_skip else 0
    return StepResult(tuple(results), num_layers - num_avoided, num_avoided)
