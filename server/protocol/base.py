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


def _none_if_false(value: Any) -> Any:
    return None if value is False else value


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
_StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
StopStrings = Annotated[_StopStrings, BeforeValidator(_as_list, StopString | _StopStrings)]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class SkipWish(Wire):
    """The request's `skip` object; what is not given stays as the server has it."""

    model_config = ConfigDict(extra="forbid")

    policy: Literal["off", "auto", SkipPolicyName] | None = None
    """What decides what is skipped; `auto`: the policy that the skip profile shows best there;
    `off`, the same as `never`: nothing is."""
    ratio: Ratio | None = None
    """Share of the FFN weights to leave out; the skip profile turns it into thresholds."""
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Policy `ffn_skip`, which it implies: cosine similarity from which a token skips; instead of a
    ratio."""
    warmup_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    """First generated tokens that are decoded in full."""
    max_skips: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    """Policy `ffn_skip`: FFN blocks that one token may skip at most."""
    budget_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    """Policy `early_exit`: generated tokens after which the exit is at its last layer."""
    trace: bool | None = None
    """Whether chunks bear the layers that their tokens skipped, and the neurons left out."""
    prompt: bool | None = None
    """Whether the prompt's tokens behind its first skip, too, as if they had been generated."""


class StreamOptions(Wire):
    include_usage: bool | None = None
    """Whether a last chunk without choices tells the usage."""
    continuous_usage_stats: bool | None = None
    """With include_usage: whether every chunk tells the usage so far."""


class GenerationRequest(Wire):
    """What chat and completions have in common. `None` is the default, as in OpenAI's API."""

    model: str | None = None
    """A name of the model; without one, the model that is served."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """How many answers to give to each prompt."""
    stream: bool | None = None
    """Whether the answer comes as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """What a stream tells besides; only with `stream`."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens to generate; what the context has no room for is clipped."""
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    """Tokens to generate before the answer may end."""
    stop: StopStrings | None = None
    """A string, or up to 16, at which the answer ends; it is not part of the answer."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    """Tokens that end the answer, besides the model's own."""
    ignore_eos: bool | None = None
    """Whether the model's own end tokens end nothing."""
    include_stop_str_in_output: bool | None = None
    """Whether the stop string is part of the answer."""
    skip_special_tokens: bool | None = None
    """Whether special tokens are left out of the text; they are by default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """How far the choice of tokens is spread; 0 takes the likeliest."""
    top_p: Ratio | None = None
    """Only the likeliest tokens whose probabilities add up to this are chosen from."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Only so many of the likeliest tokens are chosen from; 0 or -1: all."""
    min_p: Ratio | None = None
    """Tokens less likely than this share of the likeliest one are not chosen."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken from the logits of tokens that the answer has already."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Taken from a token's logit once for every time that the answer has it."""
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    """Above 1, tokens of the prompt and the answer become less likely."""
    logit_bias: Annotated[
        tuple[tuple[int, float], ...] | None, BeforeValidator(_logit_bias, dict[str, float] | None)
    ] = None
    """Added to logits: an object of token ids and numbers from -100 to 100."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """The same seed and request give the same answer."""

    # At most one of these and of the forms within them: server/tools/grammars.py.
    response_format: ResponseFormat | None = None
    """The form of the answer: text, any JSON object, or JSON under a schema."""
    structured_outputs: StructuredOutputs | None = None
    """The form as vLLM says it: one of a schema, a regex, choices or a grammar."""
    guided_json: JSONSchema | None = None
    """The older name of structured_outputs.json."""
    guided_regex: str | None = None
    """The older name of structured_outputs.regex."""
    guided_choice: Choices | None = None
    """The older name of structured_outputs.choice."""
    guided_grammar: str | None = None
    """The older name of structured_outputs.grammar."""
    guided_whitespace_pattern: str | None = None
    """What may stand between the parts of guided JSON, as a regex."""
    json_schema: JSONSchema | None = None
    """A JSON schema of the answer, as llama.cpp takes it."""
    grammar: str | None = None
    """A grammar of the answer in GBNF, as llama.cpp takes it."""

    prompt_logprobs: Annotated[
        int | None, Field(ge=0, le=20), BeforeValidator(_none_if_false, int | None)
    ] = None
    """How many of the likeliest tokens to tell at each place of the prompt, besides its own."""

    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of the prompt to use: its last ones, or see truncation_side."""
    truncation_side: Literal["left", "right"] | None = None
    """Where truncate_prompt_tokens cuts: the prompt's begin (`left`), or its end."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Prompts share what was computed of them only with those of the same salt."""
    return_token_ids: bool | None = None
    """Whether the answer tells the ids of its tokens and of the prompt's."""
    return_tokens_as_token_ids: bool | None = None
    """Whether log probabilities name tokens by their ids, as `token_id:42`."""
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")] | None = None
    """The end of the answer's `id`, for finding it again."""
    skip: SkipWish | None = None
    """How FFN blocks are skipped for this request."""
