"""Causal passes over finished answers: what decoding them token by token computes, in one piece.

A token's decisions depend on nothing behind it. So a pass in which every token of the answer
follows its rule makes the decisions that decoding makes, writes the same K and V, and ends in the
same logits:

    positions    | prompt ............ | warm-up ..... | under the rule ......... | the last
                 | in full, kept in the cache for all | each pass computes these | is only read

`layer_drop` has a rule for prompts, too: its passes begin with the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from skipllm_core.calibration.answers import Answer
from skipllm_core.model.attention import ContextRow
from skipllm_core.model.llama import Block
from skipllm_core.runner.decode import gated_forward
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.sequence import Sequence as Seq
from skipllm_core.skip.consensus import ConsensusGate
from skipllm_core.skip.policy import NeverGate, RowGate, SkipGate, gate_for, skip_at
from skipllm_core.types import SamplingParams, SkipParams

TOKENS_AT_ONCE = 1024  # products take hardly less time per token over more

# Told of each layer of a pass in full, about the tokens that decoding computes: the layer, and the
# residual before it, behind its attention, and behind it. [num_tokens, hidden] each.
Observer = Callable[[int, Block, Tensor, Tensor, Tensor], None]

# Told of each layer which neurons the tokens under a rule are without: see `gated_forward`.
NeuronObserver = Callable[[int, Tensor, Tensor], None] | None


class Group:
    """Answers that pass through the model together. Its tokens are those that decoding computes,
    answer after answer; `targets` [num_tokens] are the tokens that follow them in the text."""

    def __init__(self, seqs: list[Seq], device: torch.device) -> None:
        self.seqs = seqs
        self.full: Tensor | None = None  # h [num_tokens, hidden] by the full model, once computed
        self.num_exact = [0] * len(seqs)  # tokens whose K and V in the cache are the full model's
        self.targets = torch.tensor(
            [t for seq in seqs for t in seq.token_ids[seq.num_prompt_tokens + 1 :]], device=device
        )

    @property
    def num_tokens(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True)
class Pass:
    """What a pass computed of the tokens behind the warm-up: `places` [num_tokens] are theirs
    among the group's, `h` [num_tokens, hidden] is what the head takes, `rows` are theirs of `gate`.
    """

    places: Tensor
    h: Tensor
    rows: Sequence[int]
    gate: SkipGate


class Passes:
    """Runs answers through a model. It needs the runner's KV cache to itself: call `forget` where
    others have written to it."""

    def __init__(self, runner: TorchModelRunner, *, tokens_at_once: int = TOKENS_AT_ONCE) -> None:
        self.model = runner.model
        self._cache = runner.kv_cache
        self._tokens_at_once = tokens_at_once
        self._next_block = 0
        self._shares_blocks = False
        self._groups: list[Group] = []
        self._last: Group | None = None

    def add(self, answers: Sequence[Answer]) -> list[Group]:
        """The answers in groups. Each has blocks of its own, where its prompt stays, as long as
        there are more."""
        groups: list[list[Seq]] = []
        num_tokens = 0
        for number, answer in enumerate(answers):
            if not answer.num_decoded_tokens:
                continue
            seq = _sequence(number, answer)
            needed = -(-seq.num_tokens // self._cache.block_size)
            if self._next_block + needed > self._cache.num_blocks:
                self._next_block, self._shares_blocks = 0, True
                num_tokens = self._tokens_at_once  # another group
            if not groups or num_tokens + seq.num_tokens > self._tokens_at_once:
                groups.append([])
                num_tokens = 0
            seq.block_table = list(range(self._next_block, self._next_block + needed))
            self._next_block += needed
            num_tokens += seq.num_tokens
            groups[-1].append(seq)
        added = [Group(group, self._cache.device) for group in groups]
        self._groups += added
        return added

    def forget(self) -> None:
        """The cache is not as the passes left it."""
        for group in self._groups:
            group.num_exact = [0] * len(group.seqs)

    def in_full(self, group: Group, observe: Observer | None = None) -> Tensor:
        """h [num_tokens, hidden] of the group's tokens by the full model; kept, and computed again
        for an observer only."""
        if group.full is not None and observe is None:
            return group.full
        self._enter(group)
        spans = [_Span(seq, 0, seq.num_tokens - 1) for seq in group.seqs]
        decoded = self._tensor(_rows(spans, [seq.num_prompt_tokens for seq in group.seqs]))
        ctx = self.model.context([span.context_row for span in spans], self._cache)
        h = self.model.embed(self._token_ids(spans))
        for layer, block in enumerate(self.model.blocks):
            attended = block.attend(h, ctx)
            after = block.feed_forward(attended)
            if observe is not None:
                observe(layer, block, h[decoded], attended[decoded], after[decoded])
            h = after
        group.num_exact = [span.end for span in spans]
        group.full = h[decoded]
        return group.full

    def under(self, group: Group, skip: SkipParams, see_neurons: NeuronObserver = None) -> Pass:
        """The group's tokens behind the warm-up, computed under `skip`."""
        spans, counted, places = self._behind_warmup(group, skip)
        gate = gate_for([skip_at(span.seq, p) for span in spans for p in range(*span[1:])])
        rows = _rows(spans, counted)
        h = self._forward(spans, gate, see_neurons)
        return Pass(places, h[self._tensor(rows)], rows, gate)

    def together(self, group: Group, skip: SkipParams, see_neurons: NeuronObserver = None) -> Pass:
        """The same under the policy `neurons`, as a batch decodes whose rows leave neurons out
        together: a step for each token of the answers, all of which begin at once."""
        spans, _, places = self._behind_warmup(group, skip)
        rules = [skip_at(span.seq, p) for span in spans for p in range(*span[1:])]
        whole = RowGate(rules, leaves_out_together=True)
        ends = list(accumulate(span.end - span.start for span in spans))
        firsts = [end - (span.end - span.start) for end, span in zip(ends, spans, strict=True)]
        h = self.model.embed(self._tensor([0] * len(rules)))
        for step in range(max((span.end - span.start for span in spans), default=0)):
            now = {
                first + step: _Span(span.seq, span.start + step, span.start + step + 1)
                for first, span in zip(firsts, spans, strict=True)
                if span.start + step < span.end
            }
            gate = ConsensusGate([rules[row] for row in now])
            h[self._tensor(list(now))] = self._forward(list(now.values()), gate, see_neurons)
            for row, counts in zip(now, gate.neurons.counts, strict=True):
                whole.neurons.counts[row] = counts
        return Pass(places, h, range(len(rules)), whole)

    def _behind_warmup(
        self, group: Group, skip: SkipParams
    ) -> tuple[list[_Span], list[int], Tensor]:
        """The spans that a pass computes, their counted tokens' first positions, and these tokens'
        places. What comes before is in the cache."""
        self._enter(group)
        spans: list[_Span] = []
        counted: list[int] = []
        places: list[int] = []
        first_place = 0
        for seq in group.seqs:
            seq.skip = skip
            first, end = _first_counted(seq), seq.num_tokens - 1
            offset = first_place - seq.num_prompt_tokens
            first_place += end - seq.num_prompt_tokens
            if first >= end:
                continue
            places += range(offset + first, offset + end)
            counted.append(first)
            spans.append(_Span(seq, 0 if skip.policy == "layer_drop" else first, end))
        self._complete(group, {id(span.seq): span.start for span in spans})
        return spans, counted, self._tensor(places)

    def _complete(self, group: Group, starts: dict[int, int]) -> None:
        """Has K and V of the full model in the cache up to the starts."""
        spans = []
        for number, seq in enumerate(group.seqs):
            start = starts.get(id(seq))
            if start is None:
                continue
            if group.num_exact[number] < start:
                spans.append(_Span(seq, group.num_exact[number], start))
            group.num_exact[number] = start
        self._forward(spans, NeverGate(sum(span.end - span.start for span in spans)))

    def _forward(
        self, spans: Sequence[_Span], gate: SkipGate, see_neurons: NeuronObserver = None
    ) -> Tensor:
        if not spans:
            return self.model.embed(self._tensor([]))
        ctx = self.model.context([span.context_row for span in spans], self._cache)
        return gated_forward(self.model, self._token_ids(spans), ctx, gate, see_neurons)

    def _enter(self, group: Group) -> None:
        if self._shares_blocks and group is not self._last:
            group.num_exact = [0] * len(group.seqs)
        self._last = group

    def _token_ids(self, spans: Sequence[_Span]) -> Tensor:
        return self._tensor([t for seq, start, end in spans for t in seq.token_ids[start:end]])

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._cache.device)


class _Span(NamedTuple):
    """A sequence's tokens `start .. end - 1`."""

    seq: Seq
    start: int
    end: int

    @property
    def context_row(self) -> ContextRow:
        return ContextRow(self.start, self.end - self.start, self.seq.block_table)


def _sequence(number: int, answer: Answer) -> Seq:
    params = SamplingParams(max_tokens=len(answer.answer_ids), temperature=0, seed=number)
    seq = Seq(number, answer.prompt_ids, params)
    seq.token_ids += answer.answer_ids
    return seq


def _first_counted(seq: Seq) -> int:
    """The first position that is decoded behind the warm-up: see `skip_at`."""
    return seq.num_prompt_tokens - 1 + max(1, seq.skip.warmup_tokens)


def _rows(spans: Sequence[_Span], firsts: Sequence[int]) -> list[int]:
    """Of the spans' flat tokens, those from each one's `first` on."""
    rows: list[int] = []
    flat = 0
    for (_, start, end), first in zip(spans, firsts, strict=True):
        rows += range(flat + first - start, flat + end - start)
        flat += end - start
    return rows
