"""The parameters that chat and completions share. Bounds stand in the types; `validation.py` words
what they refuse."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from server.protocol.structured import Choices, JSONSchema, ResponseFormat, StructuredOutputs
from server.protocol.wire import Wire as Wire
from server.protocol.wire import wrong as wrong
from skipllm_core.types import SkipPolicyName

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIASES = 4096
_INT32 = 2**31 - 1


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _logit_bias(value: Any) -> Any:
    """A JSON object of token ids, which are strings there, as pairs."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong("dict_type", "", value)
    if len(value) > MAX_LOGIT_BIASES:
        raise wrong("too_long", "", value, max_length=MAX_LOGIT_BIASES)
    pairs = []
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise wrong("token_id", "", key)
        if type(bias) not in (int, float):
            raise wrong("float_type", f".{key}", bias)
        if not -100 <= bias <= 100:
            kind, bound = ("less_than_equal", "le") if bias > 100 else ("greater_than_equal", "ge")
            raise wrong(kind, f".{key}", bias, **{bound: 100.0 if bias > 100 else -100.0})
        pairs.append((int(key), float(bias)))
    return tuple(pairs)


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[StopString], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list)
]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class SkipWish(Wire):
    """The request's `skip` object; what is not given stays as the server has it."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["off", SkipPolicyName] | None = None
    ratio: Ratio | None = None
    threshold: Ratio | None = None
    warmup_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    max_skips: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    budget_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    trace: bool | None = None


class StreamOptions(Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Wire):
    """What chat and completions have in common. `None` is the default, as in OpenAI's API."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Ratio | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: Annotated[
        tuple[tuple[int, float], ...] | None, BeforeValidator(_logit_bias, dict[str, float] | None)
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None

    # At most one of these and of the forms within them: server/tools/grammars.py.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # vLLM's
    guided_json: JSONSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    json_schema: JSONSchema | None = None  # llama.cpp's
    grammar: str | None = None

    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    return_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    skip: SkipWish | None = None
