"""From a request's parameters to the engine's: every default is resolved here and nowhere else."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.protocol.base import GenerationRequest, Wire
from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.tools import check_tools
from skipllm_core.errors import ContextLengthError, InvalidRequestError
from skipllm_core.skip.profile import SkipProfile
from skipllm_core.skip.resolve import SkipDefaults, SkipOptions, resolve_skip
from skipllm_core.types import EngineInfo, SamplingParams, SkipParams

logger = logging.getLogger(__name__)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chat fills the context
MAX_PROMPT_LOGPROBS = 2**18  # of one request: some 20 MB of JSON


class SamplingDefaults(Wire):
    """What a model's generation_config.json recommends; a request's own values come first.

    `do_sample: false` there is a recommendation too: greedy.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of_model(cls, model_dir: Path) -> SamplingDefaults:
        """The recommendations within the bounds that requests have; one that is not is told and
        left out. None if there is no file."""
        path = model_dir / "generation_config.json"
        try:
            config = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError) as error:
            logger.warning("%s: no recommendations are read: %s", path, error)
            return cls()
        if not isinstance(config, dict):
            logger.warning("%s: no recommendations are read: it is not a JSON object", path)
            return cls()
        given = {name: config[name] for name in cls.model_fields if config.get(name) is not None}
        if config.get("do_sample") is False:
            given["temperature"] = 0.0
        usable = {}
        for name, value in given.items():
            try:
                GenerationRequest.model_validate({name: value})
                usable[name] = value
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                logger.warning("%s: %s is left out: %.100r: %s", path, name, value, reason)
        return cls(**usable)


def to_sampling_params(
    request: ChatRequest | CompletionRequest,
    *,
    num_prompt_tokens: int,
    info: EngineInfo,
    defaults: SamplingDefaults,
    eos_token_ids: tuple[int, ...],
    skip: SkipParams,
    grammar: str | None = None,
) -> SamplingParams:
    """The parameters of a request's first choice. Raises InvalidRequestError, and
    ContextLengthError for a prompt that leaves no room."""
    max_tokens = _max_tokens(request)
    room = info.max_model_len - num_prompt_tokens
    if room < (max_tokens != 0):
        raise ContextLengthError(
            max_model_len=info.max_model_len, num_prompt_tokens=num_prompt_tokens
        )
    min_tokens = request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequestError(
            f"Invalid 'min_tokens': expected at most max_tokens ({max_tokens}), "
            f"but got {min_tokens} instead.",
            param="min_tokens",
            code="invalid_value",
        )
    max_tokens = room if max_tokens is None else min(max_tokens, room)
    logit_bias = request.logit_bias or ()
    stop_token_ids = tuple(request.stop_token_ids or ())
    check_token_ids("logit_bias", (token_id for token_id, _ in logit_bias), info)
    check_token_ids("stop_token_ids", stop_token_ids, info)
    if not request.ignore_eos:
        stop_token_ids += eos_token_ids
    top_k = _given(request.top_k, defaults.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=min(max(top_k, 0), info.vocab_size),
        min_p=_given(request.min_p, defaults.min_p),
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=logit_bias,
        seed=secrets.randbits(63) if request.seed is None else request.seed % 2**63,
        logprobs=_num_logprobs(request),
        prompt_logprobs=num_prompt_logprobs(request),
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        grammar=grammar,
        cache_salt=request.cache_salt or "",
        skip=skip,
    )


def truncated(request: GenerationRequest, prompt_ids: list[int]) -> list[int]:
    """The tokens of a prompt that are used."""
    limit = request.truncate_prompt_tokens
    if limit is None:
        return prompt_ids
    return prompt_ids[:limit] if request.truncation_side == "right" else prompt_ids[-limit:]


def to_skip_params(
    request: GenerationRequest,
    defaults: SkipDefaults,
    profile: SkipProfile | None,
    info: EngineInfo,
) -> SkipParams:
    wish = request.skip
    options = None if wish is None else SkipOptions(**wish.model_dump())
    return resolve_skip(defaults, profile, options, info.skip_policies)


def check_combinations(request: ChatRequest | CompletionRequest) -> None:
    """Refuses parameters that contradict each other or that only the pair makes unsupported."""
    if request.stream_options is not None and not request.stream:
        raise _needs("stream_options", "stream")
    if isinstance(request, CompletionRequest):
        if request.max_tokens == 0 and not request.echo and request.prompt_logprobs is None:
            raise InvalidRequestError(
                "Invalid 'max_tokens': integer below minimum value. "
                "Expected a value >= 1, but got 0 instead.",
                param="max_tokens",
                code="integer_below_min_value",
            )
        return
    check_tools(request.tools, request.tool_choice)
    if request.top_logprobs and not request.logprobs:
        raise _needs("top_logprobs", "logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.",
            param="continue_final_message",
            code="invalid_value",
        )


def _needs(param: str, other: str) -> InvalidRequestError:
    message = f"Invalid '{param}': only allowed when '{other}' is true."
    return InvalidRequestError(message, param=param, code="invalid_value")


def _max_tokens(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return request.max_completion_tokens or request.max_tokens


def _num_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if request.logprobs else None


def num_prompt_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    """Of the two that may ask for them: vLLM's own parameter, and the echo of a prompt."""
    counts = [request.prompt_logprobs]
    if isinstance(request, CompletionRequest) and request.echo:
        counts.append(request.logprobs)
    return max((count for count in counts if count is not None), default=None)


def check_prompt_logprobs(
    request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]]
) -> None:
    """Raises InvalidRequestError where they would be too many to hold and to send."""
    num_top = num_prompt_logprobs(request)
    if num_top is None:
        return
    num_tokens = sum(map(len, prompts)) * (request.n or 1)
    if num_tokens * (1 + num_top) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"This server tells at most {MAX_PROMPT_LOGPROBS} log-probabilities of prompts at "
            f"once. However, you asked for {1 + num_top} of each of {num_tokens} tokens (over all "
            "prompts and choices). Please reduce the prompts or their number, or "
            f"'{'logprobs' if request.prompt_logprobs is None else 'prompt_logprobs'}'.",
            code="too_many_prompt_logprobs",
        )


def check_token_ids(param: str, token_ids: Iterable[int], info: EngineInfo) -> None:
    """Raises InvalidRequestError for an id that the model has no logit of."""
    for token_id in token_ids:
        if token_id >= info.vocab_size:
            raise InvalidRequestError(
                f"Invalid '{param}': token id {token_id} is outside the vocabulary of "
                f"{info.vocab_size}.",
                param=param,
                code="invalid_value",
            )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
