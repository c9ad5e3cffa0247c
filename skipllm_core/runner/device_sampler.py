"""Sampling where the logits are, without a word to the host: `runner/sampler.py` is its oracle.

    logits -> logit_bias, min_tokens, penalties, grammar -> greedy: argmax             -> token_ids
                                                         -> temperature, min_p, top_k,
                                                            top_p -> draw

What a row has said so far is counted in its slot on the device, as the host does not know its last
token when the next is sampled. A slot's state is written whole when a sequence takes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from hashlib import blake2b

import torch
from torch import Tensor

from skipllm_core.kernels.gpu.noise import exponentials
from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.runner.sampler import MIN_REPETITION_PENALTY, MIN_TEMPERATURE
from skipllm_core.sequence import Sequence
from skipllm_core.types import SamplingParams

# What a step takes for a while, at most, per row and token of the vocabulary: 25 for its tensors,
# the rest for what torch's sort takes beside them.
STEP_BYTES_PER_LOGIT = 64


class SamplingKind(IntEnum):
    """What a step's sampling has to be able to do; each kind does what those before it do."""

    GREEDY = 0  # the argmax of the logits as they are
    DRAW = 1  # penalties and biases; temperature and min_p
    CUT = 2  # top_k and top_p: sorts the vocabulary


def sampling_kind(params: Iterable[SamplingParams]) -> SamplingKind:
    """The least kind that serves all rows of a step."""
    return max((_kind(p) for p in params), default=SamplingKind.GREEDY)


def _kind(params: SamplingParams) -> SamplingKind:
    is_greedy = params.temperature < MIN_TEMPERATURE
    if not is_greedy and (params.top_k > 0 or params.top_p < 1):
        return SamplingKind.CUT
    if is_greedy and not (
        params.logit_bias
        or params.grammar
        or params.min_tokens
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    ):
        return SamplingKind.GREEDY
    return SamplingKind.DRAW


class DeviceSampler:
    """Samples the next token of every row from `rows.logits`, and makes it the row's next input.

    `token_ids` and `is_finite` tell of the last step; a row whose logits are not finite gets token
    0, which nobody sees. A row draws the same whatever other rows its step has, and whatever kind
    the step is of (drawing rows of a CUT step that cut nothing included).
    """

    def __init__(self, rows: DeviceRows) -> None:
        max_num_rows, self.vocab_size = rows.logits.shape

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((max_num_rows, *shape), value, dtype=dtype, device=rows.device)

        self.rows = rows
        # Out, in one tensor for one transfer.
        self.results = full(0, torch.int32, 2)
        # The settings of the slot's sequence.
        self.seeds = full(0, torch.int64)
        self.settings = full(0.0, torch.float32, 6)  # as _settings has them
        self.top_ks = full(self.vocab_size, torch.int64)
        self.min_tokens = full(0, torch.int32)
        self.biases = full(0.0, torch.float32, self.vocab_size)
        self.is_stop = full(0, torch.bool, self.vocab_size)
        # What its grammar does not allow next; written before each of its steps.
        self.is_barred = full(0, torch.bool, self.vocab_size)
        # What it has said.
        self.num_output_tokens = full(0, torch.int32)
        self.output_counts = full(0, torch.int32, self.vocab_size)
        self.is_seen = full(0, torch.bool, self.vocab_size)  # in prompt or output
        self._noise = full(0.0, torch.float32, self.vocab_size)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """All that is kept per slot, first dimension: the slot."""
        return (
            self.seeds,
            self.settings,
            self.top_ks,
            self.min_tokens,
            self.biases,
            self.is_stop,
            self.is_barred,
            self.num_output_tokens,
            self.output_counts,
            self.is_seen,
        )

    def assign(self, slot: int, seq: Sequence) -> None:
        """Gives the slot to a sequence all of whose tokens are known: nothing of the one before
        it stays."""
        assert not seq.num_pending_tokens
        params = seq.params
        top_k = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self.seeds[slot] = _key(params.seed)
        self.settings[slot] = torch.tensor(_settings(params)).to(self.settings.device)
        self.top_ks[slot] = top_k
        # A grammar's masks say themselves where it may stop.
        has_minimum = params.stop_token_ids and params.grammar is None
        self.min_tokens[slot] = params.min_tokens if has_minimum else 0
        self.num_output_tokens[slot] = seq.num_output_tokens
        for tensor in (
            self.biases,
            self.is_stop,
            self.is_barred,
            self.output_counts,
            self.is_seen,
        ):
            tensor[slot].zero_()
        for token_id, bias in params.logit_bias:
            if 0 <= token_id < self.vocab_size:
                self.biases[slot, token_id] += bias
        stops = [t for t in params.stop_token_ids if 0 <= t < self.vocab_size]
        self.is_stop[slot, self._ids(stops)] = True
        output = self._ids(seq.output_ids)
        self.output_counts[slot].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self.is_seen[slot, self._ids(seq.token_ids)] = True

    def move(self, source: int, slot: int) -> None:
        """Copies the state of a slot to another."""
        for tensor in self.state:
            tensor[slot].copy_(tensor[source])

    def _ids(self, token_ids: list[int]) -> Tensor:
        return torch.tensor(token_ids, dtype=torch.int64).to(self.rows.device)

    def step(self, num_rows: int, kind: SamplingKind) -> None:
        """Samples for rows[:num_rows] and moves those on that are not padded. Capturable."""
        rows = self.rows
        logits = rows.logits[:num_rows]
        is_real = rows.positions[:num_rows] >= 0
        is_finite = torch.stack(logits.aminmax(dim=-1)).isfinite().all(dim=0)
        if kind is SamplingKind.GREEDY:
            tokens = logits.argmax(dim=-1)
        else:
            tokens = self._draw(self._adjusted(logits), num_rows, kind)
        tokens = tokens.masked_fill(~(is_finite & is_real), 0)
        ids = tokens.to(torch.int32)
        self.results[:num_rows, 0] = ids
        self.results[:num_rows, 1] = is_finite.to(torch.int32)
        rows.token_ids[:num_rows] = torch.where(is_real, ids, rows.token_ids[:num_rows])
        one = is_real.to(torch.int32)
        rows.positions[:num_rows] += one
        self.num_output_tokens[:num_rows] += one
        self.output_counts[:num_rows].scatter_add_(1, tokens[:, None], one[:, None])
        seen = self.is_seen[:num_rows]
        seen.scatter_(1, tokens[:, None], seen.gather(1, tokens[:, None]) | is_real[:, None])

    def _adjusted(self, logits: Tensor) -> Tensor:
        num_rows = len(logits)
        repetition, presence, frequency = self.settings[:num_rows, 3:, None].unbind(dim=1)
        counts = self.output_counts[:num_rows]
        may_not_stop = self.num_output_tokens[:num_rows] < self.min_tokens[:num_rows]
        logits = logits + self.biases[:num_rows]
        logits = logits.masked_fill(self.is_stop[:num_rows] & may_not_stop[:, None], -torch.inf)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(self.is_seen[:num_rows], repeated, logits)
        logits = logits - frequency * counts - presence * (counts > 0)
        return logits.masked_fill_(self.is_barred[:num_rows], -torch.inf)

    def _draw(self, logits: Tensor, num_rows: int, kind: SamplingKind) -> Tensor:
        temperature, top_p, min_p = self.settings[:num_rows, :3, None].unbind(dim=1)
        is_greedy = temperature < MIN_TEMPERATURE
        best = logits.amax(dim=-1, keepdim=True)
        scores = (logits - best) / temperature.masked_fill(is_greedy, 1.0)
        scores = scores.masked_fill(scores < min_p.log(), -torch.inf)
        if kind is SamplingKind.CUT:
            scores = _cut(scores, self.top_ks[:num_rows, None], top_p)
        noise = self._noise[:num_rows]
        exponentials(noise, self.seeds[:num_rows], self.num_output_tokens[:num_rows])
        drawn = (scores - noise.log()).argmax(dim=-1)
        return torch.where(is_greedy[:, 0], logits.argmax(dim=-1), drawn)


def _settings(params: SamplingParams) -> list[float]:
    return [
        params.temperature,
        params.top_p if params.top_p < 1 else torch.inf,  # 1 has to mean all, however sums round
        params.min_p,
        max(params.repetition_penalty, MIN_REPETITION_PENALTY),
        params.presence_penalty,
        params.frequency_penalty,
    ]


def _cut(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """top_k [num_rows, 1], then the smallest set of best tokens that reaches top_p, never empty."""
    ranked = scores.sort(dim=-1, descending=True).values
    kth_best = ranked.gather(1, top_k - 1)
    ranked = ranked.masked_fill(ranked < kth_best, -torch.inf)
    probs = ranked.softmax(dim=-1)
    is_kept = probs.cumsum(dim=-1) - probs < top_p
    is_kept |= ranked == ranked[:, :1]  # the best
    is_kept &= ranked >= kth_best
    cutoff = ranked.masked_fill(~is_kept, torch.inf).amin(dim=-1, keepdim=True)
    return scores.masked_fill(scores < cutoff, -torch.inf)


def _key(seed: int) -> int:
    """The seed as 64 bits that seeds beside each other do not share."""
    return int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest(), signed=True)
