"""From logits to tokens, for rows with different settings in one batch.

    raw logits -> logit_bias, min_tokens, penalties, grammar -> greedy: argmax
         |                                                   -> temperature, min_p, top_k, top_p,
         |                                                      draw
         `-> logprobs (of the model's own distribution)

Nothing is remembered between steps: the randomness of a token follows from the sequence's seed and
the token's index alone, so neither its batch mates nor a preemption can change a draw.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from skipllm_core.engine.runner import RowResult
from skipllm_core.grammar.state import DEAD_END
from skipllm_core.sequence import Sequence
from skipllm_core.types import SamplingParams, TokenLogprobs

MIN_TEMPERATURE = 1e-5  # below it a division by the temperature only loses digits: greedy
MIN_REPETITION_PENALTY = 1e-20  # below it a division by the penalty overflows, and changes nothing

# A grammar's mask is made while the step is computed. One that takes longer costs its own row a
# turn, and not the rows beside it their time.
MASK_TIMEOUT_S = 0.02

NOT_FINITE = "the model's output was not finite"


def sample(logits: Tensor, seqs: list[Sequence]) -> list[RowResult]:
    """The next token of every row; logits [num_rows, vocab] float32 of the rows' last tokens.

    A row whose logits hold a NaN or an infinity gets an error, and so does one whose grammar allows
    no token; one whose mask is late is sampled another time. The others are unaffected.
    """
    params = [seq.params for seq in seqs]
    grammars = [seq.grammar for seq in seqs]
    masks = [grammar.mask(MASK_TIMEOUT_S) if grammar is not None else None for grammar in grammars]
    is_finite = _is_finite(logits)
    if all(map(_is_plain_greedy, params, seqs)):
        tokens = _argmax(logits)
    else:
        tokens = _draw(adjust_logits(logits, seqs, masks), seqs)
    # The one transfer of a step without logprobs.
    token_ids, finite = torch.stack((tokens, is_finite.to(tokens.dtype))).tolist()

    logprobs: dict[int, TokenLogprobs] = {}
    rows = [row for row, p in enumerate(params) if p.logprobs is not None and finite[row]]
    if rows:
        top_counts = [params[row].logprobs or 0 for row in rows]
        index = torch.tensor(rows, device=logits.device)
        found = _logprobs(logits[index], tokens[index], top_counts)
        logprobs = dict(zip(rows, found, strict=True))
    return [
        row_result(seq, token_id, logprobs.get(row), is_finite=bool(finite[row]))
        for row, (seq, token_id) in enumerate(zip(seqs, token_ids, strict=True))
    ]


def row_result(
    seq: Sequence, token_id: int, logprobs: TokenLogprobs | None, *, is_finite: bool
) -> RowResult:
    """What the row's sampled token means: where its grammar did not allow one, nothing."""
    if not is_finite:
        return RowResult(None, error=NOT_FINITE)
    grammar = seq.grammar
    if grammar is not None and grammar.is_late:
        return RowResult(None, is_late=True)
    if grammar is not None and (grammar.error or not grammar.allows(token_id)):
        return RowResult(None, error=grammar.error or DEAD_END, is_request_fault=True)
    return RowResult(token_id, logprobs)


def _is_finite(logits: Tensor) -> Tensor:
    """Whether a row has neither NaN nor infinity: [num_rows]."""
    if logits.device.type != "cpu":
        return torch.stack(logits.aminmax(dim=-1)).isfinite().all(dim=0)  # a NaN shows in both
    array = logits.numpy()  # whose reductions are 10 to 20 times as fast as torch's on the CPU
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.isfinite(array.min(-1)) & np.isfinite(array.max(-1)))


def _argmax(logits: Tensor) -> Tensor:
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.from_numpy(logits.numpy().argmax(-1))


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < MIN_TEMPERATURE


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _may_not_stop(params: SamplingParams, seq: Sequence) -> bool:
    if seq.grammar is not None:  # its mask says where it may
        return False
    return seq.num_output_tokens < params.min_tokens and bool(params.stop_token_ids)


def _is_plain_greedy(params: SamplingParams, seq: Sequence) -> bool:
    """Whether the row's token is the argmax of its raw logits."""
    return (
        _is_greedy(params)
        and seq.grammar is None
        and not params.logit_bias
        and not _has_penalties(params)
        and not _may_not_stop(params, seq)
    )


# What changes even a greedy choice ---------------------------------------------------------------


def adjust_logits(logits: Tensor, seqs: list[Sequence], masks: Rows[bytes | None] = ()) -> Tensor:
    """A copy of the logits after logit_bias, min_tokens, penalties and grammars, in this order."""
    logits = logits.clone()
    vocab_size = logits.shape[-1]
    biases = [
        ((row, token_id), bias)
        for row, seq in enumerate(seqs)
        for token_id, bias in seq.params.logit_bias
        if 0 <= token_id < vocab_size
    ]
    if biases:
        places = _places([place for place, _ in biases], logits.device)
        values = torch.tensor([bias for _, bias in biases], dtype=logits.dtype)
        logits.index_put_(places, values.to(logits.device), accumulate=True)
    barred = [
        (row, token_id)
        for row, seq in enumerate(seqs)
        if _may_not_stop(seq.params, seq)
        for token_id in seq.params.stop_token_ids
        if 0 <= token_id < vocab_size  # a stop id beyond the logits can never come
    ]
    if barred:
        logits[_places(barred, logits.device)] = -torch.inf
    penalised = [row for row, seq in enumerate(seqs) if _has_penalties(seq.params)]
    if penalised:
        index = torch.tensor(penalised, device=logits.device)
        logits[index] = _penalised(logits[index], [seqs[row] for row in penalised])
    for row, mask in enumerate(masks):
        if mask is not None:
            logits[row].masked_fill_(barred_by(mask, vocab_size).to(logits.device), -torch.inf)
    return logits


def barred_by(mask: bytes, vocab_size: int) -> Tensor:
    """The tokens that a grammar's mask does not allow: [vocab] bool, on the host."""
    bits = np.unpackbits(~np.frombuffer(mask, np.uint8), count=vocab_size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def _places(places: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, ...]:
    """(row, token id) pairs as an index into the logits."""
    return torch.tensor(places, device=device).unbind(dim=1)


def _penalised(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    """Repetition over prompt and output (CTRL, arXiv 1909.05858: positive logits are divided,
    negative ones multiplied); presence and frequency over the output (OpenAI's definition)."""
    output = torch.stack([_counts(seq.output_ids, logits) for seq in seqs])  # [num_rows, vocab]
    seen = torch.stack([_counts(seq.token_ids, logits) for seq in seqs]) > 0
    repetition, presence, frequency = (
        torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]
        for values in zip(
            *(
                (
                    max(p.repetition_penalty, MIN_REPETITION_PENALTY),
                    p.presence_penalty,
                    p.frequency_penalty,
                )
                for p in (seq.params for seq in seqs)
            ),
            strict=True,
        )
    )
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(seen, repeated, logits) - frequency * output - presence * (output > 0)


def _counts(token_ids: list[int], logits: Tensor) -> Tensor:
    """How often each token occurs: [vocab]."""
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    ones = torch.ones(len(token_ids), dtype=logits.dtype, device=logits.device)
    return torch.zeros_like(logits[0]).index_add_(0, ids, ones)


# Drawing -----------------------------------------------------------------------------------------


def _draw(logits: Tensor, seqs: list[Sequence]) -> Tensor:
    """Greedy rows: the argmax. The others: a draw from their filtered distribution. [num_rows]"""
    tokens = _argmax(logits)
    rows = [row for row, seq in enumerate(seqs) if not _is_greedy(seq.params)]
    if not rows:
        return tokens
    index = torch.tensor(rows, device=logits.device)
    drawing = [seqs[row] for row in rows]
    scores = filter_logits(logits[index], [seq.params for seq in drawing])
    # argmax(logit - log(e)) with e ~ Exp(1) is a draw from softmax(logits) (the Gumbel trick).
    noise = torch.stack([_exponentials(seq, logits) for seq in drawing])
    tokens[index] = (scores - noise.log()).argmax(dim=-1)
    return tokens


def _exponentials(seq: Sequence, like: Tensor) -> Tensor:
    """Exp(1) variates [vocab] for the sequence's next token, the same whenever it is computed."""
    name = f"{seq.params.seed}:{seq.num_output_tokens}"
    generator = torch.Generator(like.device)
    # Hashed: torch's CPU generator looks at 32 bits only, and neighbours must not be related.
    generator.manual_seed(int.from_bytes(blake2b(name.encode(), digest_size=4).digest()))
    noise = torch.empty_like(like[0]).exponential_(generator=generator)
    return noise.clamp_min_(torch.finfo(noise.dtype).tiny)


def filter_logits(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Temperature, then min_p, top_k and top_p, each over what the one before has left.

    Equal logits are kept or dropped together, so no result depends on how a sort breaks ties.
    """
    vocab_size = logits.shape[-1]

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=logits.dtype, device=logits.device)[:, None]

    best = logits.amax(dim=-1, keepdim=True)
    logits = (logits - best) / column(p.temperature for p in params)  # the best is 0: no overflow
    if any(p.min_p > 0 for p in params):
        logits = logits.masked_fill(logits < column(p.min_p for p in params).log(), -torch.inf)

    cut = [row for row, p in enumerate(params) if 0 < p.top_k < vocab_size or p.top_p < 1]
    if cut:
        index = torch.tensor(cut, device=logits.device)
        logits[index] = _top(logits[index], [params[row] for row in cut])
    return logits


def _top(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """top_k, then the smallest set of best tokens whose probability reaches top_p, never
    empty."""
    vocab_size = logits.shape[-1]
    ks = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
    k = torch.tensor(ks, device=logits.device)[:, None]
    # Rounding may sum to more than 1 before the last token: 1 has to mean "all of them".
    ps = [p.top_p if p.top_p < 1 else torch.inf for p in params]
    top_p = torch.tensor(ps, dtype=logits.dtype, device=logits.device)[:, None]
    # A full sort only where some row of the batch has no top_k.
    ranked = logits.topk(max(ks), dim=-1).values  # [num_rows, max k], best first
    kth_best = ranked.gather(1, k - 1)
    ranked = ranked.masked_fill(ranked < kth_best, -torch.inf)
    probs = ranked.softmax(dim=-1)
    is_best = ranked == ranked[:, :1]
    is_kept = (ranked >= kth_best) & ((probs.cumsum(dim=-1) - probs < top_p) | is_best)
    cutoff = ranked.masked_fill(~is_kept, torch.inf).amin(dim=-1, keepdim=True)
    return logits.masked_fill(logits < cutoff, -torch.inf)


# Logprobs ----------------------------------------------------------------------------------------


def _logprobs(logits: Tensor, tokens: Tensor, top_counts: list[int]) -> list[TokenLogprobs]:
    """Raw logits [num_rows, vocab], sampled tokens [num_rows] -> one record per row."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    tops = logprobs.topk(min(max(top_counts), logits.shape[-1]), dim=-1)
    return [
        TokenLogprobs(logprob, tuple(ids[:count]), tuple(values[:count]))
        for logprob, ids, values, count in zip(
            chosen, tops.indices.tolist(), tops.values.tolist(), top_counts, strict=True
        )
    ]
