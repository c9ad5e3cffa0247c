"""Decode steps on the device from end to end, launched ahead of the results of the last one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor

from skipllm_core.config import EngineConfig
from skipllm_core.engine.runner import Batch, ScheduledSeq, StepResult
from skipllm_core.kernels.gpu.rows import DeviceRows, RowPolicy, Variant
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
from skipllm_core.runner.launched import LaunchedStep, copy_out
from skipllm_core.runner.memory import allocated_bytes, held_tensors, tells_what_to_lower
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.runner.sampler import barred_by
from skipllm_core.runner.slots import Slots
from skipllm_core.sequence import Sequence
from skipllm_core.skip.baselines import WHOLE_LAYER_POLICIES, PlannedSkip
from skipllm_core.skip.neurons import NeuronSkip
from skipllm_core.skip.policy import SkipRule, skip_at

MakeDecoder = Callable[[LlamaModel, KVCache, DeviceRows], Decoder]

_NUM_FIELDS = 9  # of a packed row, before its block table


class GpuModelRunner(TorchModelRunner):
    """A `LateModelRunner`: prefill as its base class has it, decode steps by `DecodeGraphs`.

    The first token of a sequence is sampled and read by the prefill step, on the host's terms; all
    others are drawn on the device. Raises ConfigError as its base class does, and when the device's
    memory runs out.
    """

    # The others leave out attention, which no kernel does.
    skip_policies = tuple(
        name for name in TorchModelRunner.skip_policies if name not in WHOLE_LAYER_POLICIES
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
        rules = [skip_at(seq, seq.num_computed_tokens) for seq in seqs]
        variant = _variant(rules)
        kind = sampling_kind(seq.params for seq in seqs)
        self.graphs.launch(len(seqs), variant, kind)
        rows, count = self.rows, len(seqs)
        outputs = {
            "sampled": self.sampler.results[:count],
            "skipped": rows.skipped[:count],
            "needed": rows.num_needed,
        }
        if variant == "neurons":
            outputs |= {"neurons": rows.neuron_counts[:count], "unread": rows.unread}
        asking = {slot: row for slot, row in zip(slots, batch.rows, strict=True) if _asks(row)}
        if asking:
            outputs |= self._logprobs(asking)
        read = copy_out(outputs)
        launched = LaunchedStep(batch, slots, rules, list(asking), self.num_neurons)
        return lambda: launched.result(read())

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
        self._write_thresholds(changes.new)
        packed = [_packed(slot, seq, rows) for slot, seq in changes.new]
        for slot, seq in zip(self._slots.slot_of(seqs), seqs, strict=True):
            if self._num_blocks[slot] != len(seq.block_table):
                self._num_blocks[slot] = len(seq.block_table)
                packed.append(_packed(slot, seq, rows))
        if packed:
            self._unpack(_to_device(torch.tensor(packed, dtype=torch.int32), rows), changes.new)
        self._write_masks(seqs)
        self._write_grammars(seqs)

    def _write_thresholds(self, new: tuple[tuple[int, Sequence], ...]) -> None:
        """Those of neurons, once per sequence."""
        packed = []
        for slot, seq in new:
            if seq.skip.policy == "neurons":
                by_layer = zip(seq.skip.up_thresholds, seq.skip.down_thresholds, strict=True)
                packed.append([slot, *chain.from_iterable(by_layer)])
        if packed:
            ours = self.rows.neuron_thresholds
            values = _to_device(torch.tensor(packed, dtype=torch.float32), self.rows)
            ours.index_copy_(0, values[:, 0].long(), values[:, 1:].view(-1, *ours.shape[1:]))

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

    def _logprobs(self, asking: Mapping[int, ScheduledSeq]) -> dict[str, Tensor]:
        """By slot, of the tokens just sampled, and the best of their positions."""
        index = _to_device(torch.tensor(list(asking)), self.rows)
        most = max(row.seq.params.logprobs or 0 for row in asking.values())
        logprobs = self.rows.logits[index].log_softmax(dim=-1)
        chosen = logprobs.gather(1, self.sampler.results[index, :1].long())[:, 0]
        best = logprobs.topk(min(most, self.vocab_size), dim=-1)
        return {"logprobs": chosen, "top_ids": best.indices, "top_logprobs": best.values}


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
        rows.neuron_thresholds,
    )


def _packed(slot: int, seq: Sequence, rows: DeviceRows) -> list[int]:
    skip = seq.skip
    first = max(1, skip.warmup_tokens) + seq.num_given_tokens - 1
    policy, rule = RowPolicy.NEVER, skip_at(seq, first)
    if skip.policy in ("static", "random"):
        policy = RowPolicy.MASK
    elif rule is not None:
        policy = RowPolicy.NEURONS if isinstance(rule, NeuronSkip) else RowPolicy.FFN_SKIP
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


def _variant(rules: Iterable[SkipRule | None]) -> Variant:
    """The step that can do what the rows' rules say, and no more."""
    found = [rule for rule in rules if rule is not None]
    if any(isinstance(rule, NeuronSkip) for rule in found):
        return "neurons"
    return "skip" if found else "stock"


def _asks(row: ScheduledSeq) -> bool:
    return row.seq.params.logprobs is not None
