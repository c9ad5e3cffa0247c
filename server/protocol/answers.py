"""The parts that answers share: usage, log probabilities, token texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from server.parts import Usage
from skipllm_core.detokenizer import Detokenizer
from skipllm_core.tokenizer import Tokenizer
from skipllm_core.types import LayerNeurons, SkipUsage, TokenLogprobs

_LOWEST_LOGPROB = -9999.0  # JSON has no -inf


def skip_block(skip: SkipUsage) -> dict[str, Any]:
    """The `skip` object of every endpoint's usage."""
    return {
        "skipped_ffn_share": skip.skipped_ffn_share,
        "token_skip_ratio": skip.token_skip_ratio,
        "skipped_ffn_blocks": skip.skipped_ffn_blocks,
        "total_ffn_blocks": skip.total_ffn_blocks,
        "warmup_tokens": skip.warmup_tokens,
    }


def skip_trace(layers: Sequence[Sequence[int]], neurons: Sequence[LayerNeurons]) -> dict[str, Any]:
    """What `skip.trace` adds to a chunk or an answer: its `skip`, of one entry per token. Neurons
    are told under the policy that leaves them out. {} where nothing is traced."""
    if not layers:
        return {}
    return {"skip": {"skipped_layers": layers, **({"skipped_neurons": neurons} if neurons else {})}}


def usage_block(usage: Usage) -> dict[str, Any]:
    """The `usage` object of chats and completions."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated_tokens,
        "total_tokens": usage.num_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "skip": skip_block(usage.skip),
    }


def stop_reason(stopped_by: str | int | None, stop_token_ids: Sequence[int]) -> str | int | None:
    """vLLM's: the stop string or the token, of those that the request named, that ended an answer;
    null where it ended otherwise."""
    is_told = isinstance(stopped_by, str) or stopped_by in stop_token_ids
    return stopped_by if is_told else None


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token alone, as OpenAI shows it: `bytes:\\xe2\\x80` where it is no whole characters."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by its id, as vLLM writes it where texts would not tell tokens apart."""
    return f"token_id:{token_id}"


TokenName = Callable[[Tokenizer, int], str]


def chat_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[tuple[int, TokenLogprobs]],
    name: TokenName = token_text,
) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": name(tokenizer, token_id),
            "logprob": max(logprob, _LOWEST_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        entry(token_id, found.logprob) | {"top_logprobs": [entry(*top) for top in _top(found)]}
        for token_id, found in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[tuple[int, TokenLogprobs | None]],
    text_offsets: Sequence[int],
    num_top: int,
    name: TokenName = token_text,
) -> dict[str, Any]:
    """The legacy object. A token's offset counts the whole characters before it: tokens that are
    parts of one character share theirs. Nothing is known of a prompt's first token."""
    texts: list[str] = []
    logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for token_id, found in tokens:
        text = name(tokenizer, token_id)
        texts.append(text)
        if found is None:
            logprobs.append(None)
            top_logprobs.append(None)
            continue
        logprobs.append(max(found.logprob, _LOWEST_LOGPROB))
        best = list(_top(found))[:num_top]
        top = {name(tokenizer, i): max(value, _LOWEST_LOGPROB) for i, value in best}
        top_logprobs.append(top | {text: max(found.logprob, _LOWEST_LOGPROB)})
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": list(text_offsets),
    }


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's object: for each token of the prompt but the first, of which nothing is known, the
    token itself and the `num_top` best, by their ids."""

    def entry(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        logprob = max(logprob, _LOWEST_LOGPROB)
        return {
            "logprob": logprob, "rank": rank, "decoded_token": token_text(tokenizer, token_id),
        }  # fmt: skip

    entries: list[dict[str, Any] | None] = [None]
    for token_id, scored in zip(token_ids[1:], found, strict=True):
        best = list(_top(scored))[:num_top]
        top = {str(i): entry(i, value, rank) for rank, (i, value) in enumerate(best, 1)}
        entries.append({str(token_id): entry(token_id, scored.logprob, scored.rank)} | top)
    return entries


def echo_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], echoed: str) -> list[int]:
    """Where in the prompt's echoed text its tokens begin. Those that were put before the text (a
    begin of sequence, a space) begin with it."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    text, offsets = "", []
    for token_id in token_ids:
        offsets.append(detokenizer.num_chars)
        text += detokenizer.add(token_id)
    num_added = len(text) - len(echoed) if text.endswith(echoed) else 0
    return [min(max(0, offset - num_added), len(echoed)) for offset in offsets]


def _top(found: TokenLogprobs) -> Iterable[tuple[int, float]]:
    return zip(found.top_ids, found.top_logprobs, strict=True)
