"""Training batches: fresh conversations packed into rows, a pure function of (seed, step)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skipllm_core.demo.data.dialogues import DialogueMaker
from skipllm_core.demo.training.tokenizer import Renderer


@dataclass(frozen=True, slots=True)
class Batch:
    """``inputs`` [rows, length]; ``where``, ``targets``, ``weights`` [n] for the judged positions,
    where ``where`` indexes the flattened rows."""

    inputs: Tensor
    where: Tensor
    targets: Tensor
    weights: Tensor


def make_batch(renderer: Renderer, seed: int, step: int, num_rows: int, row_length: int) -> Batch:
    """The batch of one step: it depends on nothing else, so a resumed run sees the same data."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    weights: list[list[float]] = [[] for _ in range(num_rows)]
    num_misses = 0
    maker = DialogueMaker(seed * 1_000_003 + step)
    for conversation in maker.conversations():
        ids, ids_weights = renderer.render(conversation)
        # One position more than the row: the last id is only a target.
        fits = (r for r in range(num_rows) if len(rows[r]) + len(ids) <= row_length + 1)
        row = next(fits, None)
        if row is None:
            num_misses += 1
            if num_misses == 3:
                break
            continue
        rows[row] += ids
        weights[row] += ids_weights
    padded = torch.tensor([_pad(row, row_length + 1) for row in rows])
    mask = torch.tensor([_pad(row, row_length + 1) for row in weights], dtype=torch.float32)
    targets, target_weights = padded[:, 1:].reshape(-1), mask[:, 1:].reshape(-1)
    where = target_weights.nonzero().squeeze(1)
    return Batch(padded[:, :-1].contiguous(), where, targets[where], target_weights[where])


def _pad(row: list[int] | list[float], length: int) -> list[int | float]:
    return [*row, *[type(row[0])(0)] * (length - len(row))]
