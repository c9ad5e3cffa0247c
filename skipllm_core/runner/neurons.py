"""The feed-forward with neurons left out, by torch's operators: what all kernels are held to.

Dense, with masks: it spares nothing. The rule is that of `skip.neurons`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from skipllm_core.model.llama import Block
from skipllm_core.skip.neurons import NeuronCounts


def feed_forward_neurons(
    block: Block,
    h: Tensor,
    thresholds: Sequence[tuple[float, float]],
    *,
    is_joint: bool = False,
) -> tuple[Tensor, NeuronCounts]:
    """h + FFN(norm2(h)) for h [num_rows, hidden], each row without the neurons below its thresholds
    (before up, before down); and what was left out. A row whose thresholds are 0 runs them all."""
    ffn = block.ffn
    gate, up = ffn.gate_up(block.norm2(h)).chunk(2, dim=-1)
    activation = F.silu(gate)
    norms = ffn.down_norms.to(h.device)
    before_up, before_down = torch.tensor(thresholds, device=h.device).unbind(dim=1)
    has_rule = (before_up > 0) | (before_down > 0)
    nothing = torch.zeros(activation.shape, dtype=torch.bool, device=h.device)

    score = activation.float().abs() * norms
    no_up = _left_out(score, before_up, has_rule, nothing, is_joint=is_joint)
    product = activation * up
    score = product.float().abs() * norms
    no_down = no_up | _left_out(score, before_down, has_rule, no_up, is_joint=is_joint)
    after = h + ffn.down(torch.where(no_down, torch.zeros_like(product), product))
    return after, NeuronCounts(
        before_up=no_up.sum(dim=1).tolist(),
        before_down=(no_down & ~no_up).sum(dim=1).tolist(),
        unread_up=int(no_up.all(dim=0).sum()),
        unread_down=int(no_down.all(dim=0).sum()),
    )


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
