"""Gates: which rows run a layer's FFN. A policy decides here, the decode step acts on it.

The rule of FFN-SkipLLM (arXiv 2404.03865), for one token of one row:

    layer      0 .. | cold_start ......... trigger | trigger + 1 .. cold_end - 1 | cold_end .. L-1
    FFN        run  | run, similarity watched      | skipped, h passes unchanged | run

The trigger is the first watched layer whose cos(h, h + FFN(h)) reaches the row's threshold. It is
found anew for every token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor

from skipllm_core import sequence
from skipllm_core.skip.baselines import PlannedSkip, planned_skip
from skipllm_core.skip.neurons import NeuronRows, NeuronSkip, neuron_skip
from skipllm_core.types import ROWS_PER_NEURON, SkipParams

# One token's: of blocks, adaptive or known before its step; or of neurons.
SkipRule: TypeAlias = SkipParams | PlannedSkip | NeuronSkip


class SkipGate(Protocol):
    """Asked by the decode step, layer after layer, for one step.

    `rows_to_run(layer)` is called once per layer and gives the rows (in ascending order) that run
    its FFN. Where some did and the gate `watches(layer)`, `observe` is then told every row's
    `similarity` of the residual before and after the FFN: 1 for a row that did not run.

    `neurons` says what the rows leave out of the blocks that they run. Where it `has_rules`, it is
    asked for a layer's thresholds, and told what came of them.
    """

    @property
    def skipped_layers(self) -> Sequence[Sequence[int]]:
        """Per row, the layers it skipped so far, ascending."""
        ...

    @property
    def whole_layer_rows(self) -> Collection[int]:
        """Rows that leave out the attention of the layers whose FFN they skip, too."""
        ...

    @property
    def neurons(self) -> NeuronRows: ...

    def rows_to_run(self, layer: int) -> Collection[int]: ...

    def watches(self, layer: int) -> bool: ...

    def observe(self, layer: int, similarities: Sequence[float]) -> None: ...


class NeverGate:
    """Every row runs every layer; used whenever no row of the step can skip, and costs nothing."""

    whole_layer_rows: Collection[int] = ()

    def __init__(self, num_rows: int) -> None:
        self.skipped_layers: list[tuple[int, ...]] = [()] * num_rows
        self.neurons = NeuronRows([None] * num_rows)
        self._rows = range(num_rows)

    def rows_to_run(self, layer: int) -> Collection[int]:
        return self._rows

    def watches(self, layer: int) -> bool:
        return False

    def observe(self, layer: int, similarities: Sequence[float]) -> None:
        pass


class RowGate:
    """Each row by its own rule (`row_exact`): a row's decisions depend on it alone.

    `rows` bears each row's rule, as `skip_at` gives it: the settings of the adaptive rule above, a
    plan, thresholds of neurons, or None for a row that cannot skip in this step. Control flow is on
    the host: it watches the layers at which some row may still trigger.
    """

    def __init__(
        self, rows: Sequence[SkipRule | None], *, leaves_out_together: bool = False
    ) -> None:
        self.skipped_layers: list[list[int]] = [[] for _ in rows]
        self.neurons = NeuronRows(rows, is_joint=leaves_out_together)
        self._rows = range(len(rows))
        self._watched = {row: rule for row, rule in enumerate(rows) if isinstance(rule, SkipParams)}
        self._triggered: dict[int, SkipParams] = {}
        self._planned = {row: rule for row, rule in enumerate(rows) if _is_plan(rule)}
        self.whole_layer_rows: Collection[int] = [
            row for row, plan in self._planned.items() if plan.whole_layers
        ]

    def rows_to_run(self, layer: int) -> Collection[int]:
        if not self._triggered and not self._planned:
            return self._rows
        return [row for row in self._rows if not self._skips(row, layer)]

    def _skips(self, row: int, layer: int) -> bool:
        skipped = self.skipped_layers[row]
        if (skip := self._triggered.get(row)) is not None:
            if not may_skip(skip, layer, len(skipped)):
                return False
        elif (plan := self._planned.get(row)) is None or layer not in plan.layers:
            return False
        skipped.append(layer)
        return True

    def watches(self, layer: int) -> bool:
        return any(may_trigger(skip, layer) for skip in self._watched.values())

    def observe(self, layer: int, similarities: Sequence[float]) -> None:
        for row, skip in tuple(self._watched.items()):
            if may_trigger(skip, layer) and similarities[row] >= skip.threshold:
                self._triggered[row] = self._watched.pop(row)


def _is_plan(rule: SkipRule | None) -> TypeGuard[PlannedSkip]:
    return isinstance(rule, PlannedSkip)


def may_skip(skip: SkipParams, layer: int, num_skipped: int) -> bool:
    """Whether a row under `skip`, once it has triggered, skips this layer too."""
    is_in_region = skip.cold_start <= layer < skip.cold_end
    return is_in_region and (skip.max_skips is None or num_skipped < skip.max_skips)


def may_trigger(skip: SkipParams, layer: int) -> bool:
    """Whether a row under `skip` is watched at this layer."""
    # A trigger at the last skippable layer would change nothing: there is no next one.
    return skip.cold_start <= layer < skip.cold_end - 1


class ForcedGate:
    """Skips exactly the given blocks: `mask[row][layer]` true means skipped, whatever is seen."""

    whole_layer_rows: Collection[int] = ()

    def __init__(self, mask: Sequence[Sequence[bool]]) -> None:
        self.skipped_layers: list[list[int]] = [[] for _ in mask]
        self.neurons = NeuronRows([None] * len(mask))
        self._mask = mask

    def rows_to_run(self, layer: int) -> Collection[int]:
        rows = []
        for row, skips in enumerate(self._mask):
            if skips[layer]:
                self.skipped_layers[row].append(layer)
            else:
                rows.append(row)
        return rows

    def watches(self, layer: int) -> bool:
        return False

    def observe(self, layer: int, similarities: Sequence[float]) -> None:
        pass


def similarity(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of the residual stream before and after the FFN add, in fp32.

    [num_rows, hidden] twice -> [num_rows] float32.
    """
    return torch.cosine_similarity(before.to(torch.float32), after.to(torch.float32), dim=-1)


def gate_for(rows: Sequence[SkipRule | None]) -> SkipGate:
    """The gate of a step over these rows: the free one when none of them can skip."""
    if any(row is not None for row in rows):
        return RowGate(rows)
    return NeverGate(len(rows))


def skip_at(seq: sequence.Sequence, position: int) -> SkipRule | None:
    """The rule under which the token at `position` of `seq` is decoded; None: in full.

    The token at `num_given_tokens - 1 + t` is the one whose decoding generates output token t. The
    given tokens (t <= 0; the prompt's, or its first) and the first `warmup_tokens` behind them are
    computed in full, but for `layer_drop`.
    """
    skip = seq.skip
    if skip.policy == "never":
        return None
    generated = position - seq.num_given_tokens + 1
    if skip.policy not in ("ffn_skip", "neurons"):
        return planned_skip(seq, position, generated)
    if generated < max(1, skip.warmup_tokens):
        return None
    if skip.policy == "neurons":
        return neuron_skip(skip)
    if skip.max_skips == 0 or skip.cold_end - skip.cold_start < 2:
        return None  # nothing is skippable: spare the similarities
    return skip


def weight_reads_avoided(gate: SkipGate, num_neurons: int) -> float:
    """FFN weights that no row of the step wanted, in layers' worth: layers that every row skipped,
    and rows of weights in the others."""
    rows = gate.skipped_layers
    whole = len(set(rows[0]).intersection(*rows[1:])) if rows else 0
    return whole + gate.neurons.num_unread_rows / (ROWS_PER_NEURON * num_neurons)
