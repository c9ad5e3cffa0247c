"""The feed-forward with neurons left out, by torch's operators: what all kernels are held to.

Dense, with masks: it spares nothing. The rule is that of `skip.neurons`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from skipllm_core.model.llama import Block
from skipllm_core.skip.neurons import NeuronCounts

# Told which neurons each row is without, before up, and before down at the latest: [num_rows,
# inner] each. Calibration counts them.
SeeNeurons = Callable[[Tensor, Tensor], None]


def feed_forward_neurons(
    block: Block,
    h: Tensor,
    thresholds: Sequence[tuple[float, float]],
    *,
    is_joint: bool = False,
    see: SeeNeurons | None = None,
) -> tuple[Tensor, NeuronCounts]:
    """h + FFN(norm2(h)) for h [num_rows, hidden], each row without the neurons below its thresholds
    (before up, before down); and what was left out. A row whose thresholds are 0 runs them all."""
    product, first_score, second_score = neuron_scores(block, h)
    before_up, before_down = torch.tensor(thresholds, device=h.device).unbind(dim=1)
    has_rule = (before_up > 0) | (before_down > 0)
    nothing = torch.zeros(product.shape, dtype=torch.bool, device=h.device)

    no_up = _left_out(first_score, before_up, has_rule, nothing, is_joint=is_joint)
    no_down = no_up | _left_out(second_score, before_down, has_rule, no_up, is_joint=is_joint)
    if see is not None:
        see(no_up, no_down)
    after = h + block.ffn.down(torch.where(no_down, torch.zeros_like(product), product))
    return after, NeuronCounts(
        before_up=no_up.sum(dim=1).tolist(),
        before_down=(no_down & ~no_up).sum(dim=1).tolist(),
        unread_up=int(no_up.all(dim=0).sum()),
        unread_down=int(no_down.all(dim=0).sum()),
    )


def neuron_scores(block: Block, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of h [num_rows, hidden] before the block's feed-forward: what down multiplies, and the
    neurons' scores before up and before down, in float32. [num_rows, inner] each."""
    ffn = block.ffn
    gate, up = ffn.gate_up(block.norm2(h)).chunk(2, dim=-1)
    activation = F.silu(gate)
    norms = ffn.down_norms.to(h.device)
    product = activation * up
    return product, activation.float().abs() * norms, product.float().abs() * norms


def _left_out(
    score: Tensor, thresholds: Tensor, has_rule: Tensor, already: Tensor, *, is_joint: bool
) -> Tensor:
    """[num_rows, inner]: which neurons go, of those that have not gone `already`."""
    own = (score < thresholds[:, None]) & ~already
    if not is_joint or not bool(has_rule.any()):
        return own
    num_rows = int(has_rule.sum())
    gone = already[has_rule][0]  # the same ones for all of these rows
    count = int(own[has_rule].sum()) // num_rows
    together = score[has_rule].square().sum(dim=0)
    left = together[~gone]
    if count < len(left):
        # What is no number sorts last, and is below nothing.
        chosen = (together < left.sort().values[count]) & ~gone
    else:
        chosen = ~gone & ~together.isnan()
    return chosen[None] & has_rule[:, None]
