"""What a step's rows add up to, for the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.types import LayerNeurons, sum_by_layer


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Prompt tokens computed; and by layer, of the tokens that follow a skip policy (those decoded,
    and prompts under `skip.prompt`), how many ran the FFN and skipped it: empty if there are none.
    So too the neurons that tokens left out of the layers which they ran.
    """

    num_prompt_tokens: int
    ffn_computed: tuple[int, ...]
    ffn_skipped: tuple[int, ...]
    neurons: LayerNeurons = ()


def count_tokens(batch: Batch, result: StepResult, num_layers: int) -> TokenCounts:
    num_skippable = num_prompt_tokens = 0
    num_skipped = [0] * num_layers
    neurons: list[LayerNeurons] = []
    for row, row_result in zip(batch.rows, result.rows, strict=True):
        if row_result.error is not None:
            continue
        if batch.kind == "decode":
            num_skippable += 1
            neurons.append(row_result.neurons)
            for layer in row_result.skipped_layers:
                num_skipped[layer] += 1
            continue
        num_prompt_tokens += row.num_tokens
        if (skips := row_result.prompt_skips) is not None:
            num_skippable += skips.num_tokens
            neurons.append(skips.neurons)
            num_skipped = [a + b for a, b in zip(num_skipped, skips.num_skipping, strict=True)]
    if not num_skippable:
        return TokenCounts(num_prompt_tokens, (), ())
    num_computed = tuple(num_skippable - num for num in num_skipped)
    return TokenCounts(num_prompt_tokens, num_computed, tuple(num_skipped), sum_by_layer(neurons))
