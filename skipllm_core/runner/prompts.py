"""What a prefill tells of the prompts themselves: log-probabilities of their tokens, and skips.

A residual scores the token that follows its own, so a chunk of a prompt is scored up to the token
behind it. Logits exist for a slice of tokens at a time, never for a whole chunk:

    hidden   [chunk, hidden]     | head of a slice | -> what is asked for, some numbers per token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from skipllm_core.engine.runner import PromptSkips, ScheduledSeq
from skipllm_core.skip.policy import SkipGate
from skipllm_core.types import TokenLogprobs, sum_by_layer

# The logits [number of places, vocab] float32 at places in the step's flat tokens, ascending.
Head = Callable[[Sequence[int]], Tensor]

SLICE_LOGITS = 2**23  # that exist at once: 32 MiB


def score_prompts(rows: Sequence[ScheduledSeq], head: Head) -> list[tuple[TokenLogprobs, ...]]:
    """Per row, the records of the prompt tokens that follow its new ones; none where the sequence
    does not ask. A record whose logits were not finite has a NaN."""
    counts, places, targets = [], [], []
    first = 0
    for row in rows:
        seq, start = row.seq, row.seq.num_computed_tokens
        is_asked = seq.params.prompt_logprobs is not None
        following = [p + 1 for p in row.new_prompt_tokens if p + 1 < seq.num_prompt_tokens]
        following = following if is_asked else []
        counts.append(len(following))
        places += [first + position - 1 - start for position in following]
        targets += [seq.token_ids[position] for position in following]
        first += row.num_tokens
    if not places:
        return [()] * len(rows)
    num_top = max(row.seq.params.prompt_logprobs or 0 for row in rows)
    found = iter(score(head, places, targets, num_top))
    return [
        tuple([_cut(next(found), row.seq.params.prompt_logprobs or 0) for _ in range(count)])
        for row, count in zip(rows, counts, strict=True)
    ]


def score(
    head: Head, places: Sequence[int], targets: Sequence[int], num_top: int
) -> list[TokenLogprobs]:
    """One record per place: of its target token, and of the `num_top` best."""
    values, ranks, ids = [], [], []
    size, at = 1, 0  # the first slice tells how wide logits are
    while at < len(places):
        logits = head(places[at : at + size])
        tokens = torch.tensor(targets[at : at + size], device=logits.device)[:, None]
        at += size
        size = max(1, SLICE_LOGITS // logits.shape[-1])
        total = logits.logsumexp(dim=-1, keepdim=True)
        total = torch.where(total.isfinite(), total, torch.nan)
        logit = logits.gather(1, tokens)
        top = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
        values.append(torch.cat((logit, top.values), dim=1) - total)
        ranks.append((logits > logit).sum(dim=-1) + 1)
        ids.append(top.indices)
    return [
        TokenLogprobs(logprob, tuple(top_ids), tuple(top_logprobs), rank)
        for (logprob, *top_logprobs), top_ids, rank in zip(
            torch.cat(values).tolist(),
            torch.cat(ids).tolist(),
            torch.cat(ranks).tolist(),
            strict=True,
        )
    ]


def _cut(found: TokenLogprobs, count: int) -> TokenLogprobs:
    if count == len(found.top_ids):
        return found
    return TokenLogprobs(
        found.logprob, found.top_ids[:count], found.top_logprobs[:count], found.rank
    )


def prompt_skips(
    row: ScheduledSeq, first: int, gate: SkipGate, num_layers: int
) -> PromptSkips | None:
    """Of the row, whose tokens are the gate's rows from `first` on; None where its prompt is
    computed in full."""
    seq = row.seq
    if not seq.skip.prompt:
        return None
    positions = [p for p in row.new_prompt_tokens if p >= seq.num_given_tokens]
    num_skipping = [0] * num_layers
    tokens = [first + position - seq.num_computed_tokens for position in positions]
    for token in tokens:
        for layer in gate.skipped_layers[token]:
            num_skipping[layer] += 1
    neurons = sum_by_layer([gate.neurons.counts[token] for token in tokens])
    return PromptSkips(len(positions), tuple(num_skipping), neurons)
