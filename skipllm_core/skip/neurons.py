"""Neurons left out one by one, token by token: the rule of the policy `neurons`.

    FFN(z) = sum over neurons j of   silu(g_j . z) * (u_j . z) * d_j      g, u: rows of gate and up
                                                                          d: columns of down
    1. the gate of all neurons      a_j = silu(g_j . z)
    2. out before up                where |a_j| * ||d_j|| is below the layer's first threshold
    3. up of the others             b_j = a_j * (u_j . z)
    4. out before down              where |b_j| * ||d_j|| is below the second
    5. down of the others           FFN(z) = sum of b_j * d_j

So a neuron that is out before up leaves two of its three rows of weights unread, one that is out
before down leaves one. What is no number is below nothing: it is kept, and seen in the output.

Sources: thresholds on the gate by layer, from quantiles, are CATS' (arXiv 2404.08763); thresholds
on magnitudes without training are TEAL's (2408.14690); the column's norm makes a score of what the
neuron can add to the residual.

No torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from skipllm_core.types import SkipParams


@dataclass(frozen=True, slots=True)
class NeuronSkip:
    """One token's rule: thresholds by layer, before up and before down."""

    up: tuple[float, ...]
    down: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NeuronCounts:
    """What rows left out of a layer's neurons: before up, and of the others before down; and how
    many rows of up's weights and of down's none of those that ran the layer wanted."""

    before_up: Sequence[int]
    before_down: Sequence[int]
    unread_up: int
    unread_down: int

    def of_rows(self, rows: Collection[int], num_rows: int) -> NeuronCounts:
        """These counts, of `rows` of a step, as the step's: the others left nothing out."""
        before_up, before_down = [0] * num_rows, [0] * num_rows
        for at, row in enumerate(rows):
            before_up[row], before_down[row] = self.before_up[at], self.before_down[at]
        return NeuronCounts(before_up, before_down, self.unread_up, self.unread_down)


def neuron_skip(skip: SkipParams) -> NeuronSkip | None:
    """The rule of settings under the policy `neurons`; None where they leave nothing out."""
    if not any(skip.up_thresholds) and not any(skip.down_thresholds):
        return None
    return NeuronSkip(skip.up_thresholds, skip.down_thresholds)


class NeuronRows:
    """The part of a gate that is about neurons: the rules of a step's rows, and what they led to.

    `is_joint`: the rows under such a rule leave the same neurons out, so that their weights are not
    read. Of each layer, as many as these rows would on average leave out by themselves, rounded
    down; and those with the lowest sum, over these rows, of the squared score. The second choice is
    made in the same way among the neurons that are left.
    """

    def __init__(self, rules: Sequence[object], *, is_joint: bool = False) -> None:
        self._rules = [rule if isinstance(rule, NeuronSkip) else None for rule in rules]
        self.has_rules = any(rule is not None for rule in self._rules)
        self.is_joint = is_joint
        self.counts: list[list[tuple[int, int]]] = [[] for _ in rules]  # by row, then by layer
        self.num_unread_rows = 0  # of FFN weights, in layers that some row ran

    def thresholds(self, layer: int) -> list[tuple[float, float]]:
        """Of each row of the step, before up and before down; 0 leaves nothing out."""
        return [
            (0.0, 0.0) if rule is None else (rule.up[layer], rule.down[layer])
            for rule in self._rules
        ]

    def count(self, layer: int, counts: NeuronCounts) -> None:
        """What came of the thresholds in a layer that some row ran."""
        for row, rule in enumerate(self._rules):
            if rule is not None:
                found = self.counts[row]
                found += [(0, 0)] * (layer - len(found))
                found.append((counts.before_up[row], counts.before_down[row]))
        self.num_unread_rows += counts.unread_up + counts.unread_down
