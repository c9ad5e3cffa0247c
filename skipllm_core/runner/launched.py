"""A decode step under way on the device: what is copied of it, and what that says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.runner.sampler import row_result
from skipllm_core.skip.neurons import NeuronSkip
from skipllm_core.skip.policy import SkipRule
from skipllm_core.types import ROWS_PER_NEURON, TokenLogprobs

Outputs = Mapping[str, Tensor]


def copy_out(tensors: Outputs) -> Callable[[], Outputs]:
    """Copies for the host as they stand at this point of the stream; the call waits for them."""
    if all(tensor.device.type != "cuda" for tensor in tensors.values()):
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        return lambda: copies
    copies = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=True)
        for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def read() -> Outputs:
        event.synchronize()
        return copies

    return read


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """What the host knows of it. `slots` and `rules` are those of the batch's rows; `asking`, the
    slots whose log-probabilities are copied, in their order."""

    batch: Batch
    slots: list[int]
    rules: list[SkipRule | None]
    asking: list[int]
    num_neurons: int  # of a layer

    def result(self, outputs: Outputs) -> StepResult:
        """`outputs`: by slot `sampled` (token, whether its logits were finite), `skipped` [rows,
        num_layers], `neurons` [rows, num_layers, 2] where a rule is about them; by layer `needed`
        and, with `neurons`, `unread` (rows of up, of down); and the log-probabilities."""
        sampled, skipped = outputs["sampled"].tolist(), outputs["skipped"].tolist()
        needed = outputs["needed"].tolist()
        neurons = outputs["neurons"].tolist() if "neurons" in outputs else None
        logprobs = self._logprobs(outputs)
        rows = []
        for slot, row, rule in zip(self.slots, self.batch.rows, self.rules, strict=True):
            token_id, is_finite = sampled[slot]
            found = row_result(row.seq, token_id, logprobs.get(slot), is_finite=bool(is_finite))
            if rule is not None and found.token_id is not None:
                layers = tuple(layer for layer, skips in enumerate(skipped[slot]) if skips)
                found = replace(found, skipped_layers=layers)
                if neurons is not None and isinstance(rule, NeuronSkip):
                    found = replace(found, neurons=tuple(map(tuple, neurons[slot])))
            rows.append(found)
        avoided = 0.0
        if any(rule is not None for rule in self.rules):
            avoided += sum(num_rows == 0 for num_rows in needed)
        if neurons is not None:
            avoided += int(outputs["unread"].sum()) / (ROWS_PER_NEURON * self.num_neurons)
        return StepResult(tuple(rows), len(needed) - avoided, avoided)

    def _logprobs(self, outputs: Outputs) -> dict[int, TokenLogprobs]:
        """By slot, of the rows that ask for them."""
        if not self.asking:
            return {}
        seqs = {slot: row.seq for slot, row in zip(self.slots, self.batch.rows, strict=True)}
        names = ("logprobs", "top_ids", "top_logprobs")
        values = [outputs[name].tolist() for name in names]
        found = {}
        for slot, chosen, ids, best in zip(self.asking, *values, strict=True):
            count = seqs[slot].params.logprobs
            found[slot] = TokenLogprobs(chosen, tuple(ids[:count]), tuple(best[:count]))
        return found
