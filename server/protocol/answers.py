"""The parts that answers share: usage, log probabilities, token texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from server.parts import Usage
from skipllm_core.tokenizer import Tokenizer
from skipllm_core.types import SkipUsage, TokenLogprobs

_LOWEST_LOGPROB = -9999.0  # JSON has no -inf


def skip_block(skip: SkipUsage) -> dict[str, Any]:
    """The `skip` object of every endpoint's usage."""
    return {
        "token_skip_ratio": skip.token_skip_ratio,
        "skipped_ffn_blocks": skip.skipped_ffn_blocks,
        "total_ffn_blocks": skip.total_ffn_blocks,
        "warmup_tokens": skip.warmup_tokens,
    }


def usage_block(usage: Usage) -> dict[str, Any]:
    """The `usage` object of chats and completions."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated_tokens,
        "total_tokens": usage.num_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
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


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[tuple[int, TokenLogprobs]]
) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_text(tokenizer, token_id),
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
    tokens: Sequence[tuple[int, TokenLogprobs]],
    text_offsets: Sequence[int],
) -> dict[str, Any]:
    """The legacy object. A token's offset counts the whole characters before it: tokens that are
    parts of one character share theirs."""
    texts, top_logprobs = [], []
    for token_id, found in tokens:
        text = token_text(tokenizer, token_id)
        texts.append(text)
        top = {token_text(tokenizer, i): max(value, _LOWEST_LOGPROB) for i, value in _top(found)}
        top_logprobs.append(top | {text: max(found.logprob, _LOWEST_LOGPROB)})
    return {
        "tokens": texts,
        "token_logprobs": [max(found.logprob, _LOWEST_LOGPROB) for _, found in tokens],
        "top_logprobs": top_logprobs,
        "text_offset": list(text_offsets),
    }


def _top(found: TokenLogprobs) -> Iterable[tuple[int, float]]:
    return zip(found.top_ids, found.top_logprobs, strict=True)
