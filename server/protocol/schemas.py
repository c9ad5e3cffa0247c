"""What answers look like, for /openapi.json. Nothing is built from these models; tests hold the
answers against them, and a key that is not here is a fault."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from skipllm_core.types import EngineState


class Described(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorObject(Described):
    message: str
    type: str
    """`invalid_request_error` for what the client can mend, `server_error` for the rest."""
    param: str | None
    """The parameter that is wrong, as a path: `messages[0].role`."""
    code: str | None
    """A word for programs, as `context_length_exceeded`."""


class Error(Described):
    error: ErrorObject


class SkipUsage(Described):
    skipped_ffn_share: float
    """Share of the FFN weights that were not used, whatever the policy: a skipped block leaves out
    all of its layer's, a neuron its rows of up and down."""
    token_skip_ratio: float
    """Skipped FFN blocks, whole ones, / (decoded tokens x layers)."""
    skipped_ffn_blocks: int
    total_ffn_blocks: int
    warmup_tokens: int


class PromptTokensDetails(Described):
    cached_tokens: int
    """Prompt tokens whose K/V an earlier request had computed."""


class CompletionTokensDetails(Described):
    reasoning_tokens: int


class Usage(Described):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None
    skip: SkipUsage


class SkipTrace(Described):
    skipped_layers: list[list[int]]
    """For each token, the layers whose FFN it skipped."""
    skipped_neurons: list[list[tuple[int, int]]] | None = None
    """Under the policy `neurons`: for each token, by layer, how many neurons it left out before up,
    and of the others before down; nothing for a token that ran them all."""


class TokenLogprob(Described):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Described):
    content: list[ContentLogprob]
    refusal: None


class CompletionLogprobs(Described):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length", "tool_calls"]
PromptLogprobs = list[dict[str, Any] | None]


class CalledFunction(Described):
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


class ToolCall(Described):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Described):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same, as vLLM calls it."""
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Described):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    """The stop string or the stop token that ended the answer."""
    token_ids: list[int] | None
    """With return_token_ids: the answer's tokens."""
    skip: SkipTrace | None = None


class Answered(Described):
    """What all answers of the two endpoints begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    service_tier: None


class ChatCompletion(Answered):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] | None
    """With return_token_ids: the prompt's tokens, after truncation."""
    kv_transfer_params: None


class FunctionDelta(Described):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Described):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Described):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """The same, as vLLM calls it."""
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Described):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Answered):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    skip: SkipTrace | None = None


class CompletionChunkChoice(Described):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionChoice(Described):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None
    skip: SkipTrace | None = None


class Completion(Answered):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage
    kv_transfer_params: None


class CompletionChunk(Answered):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
    skip: SkipTrace | None = None


class ModelCard(Described):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Described):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Described):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None
    """With return_token_strs: the tokens as the vocabulary spells them."""


class Text(Described):
    prompt: str


class Status(Described):
    status: str


class Health(Described):
    status: EngineState
    detail: str


class Version(Described):
    version: str


class ServerInfo(BaseModel):
    """Grows with the server: what is not named here may be there, too."""

    version: str
    model: str
    engine: dict[str, Any]
    sampling_defaults: dict[str, Any]
    skip: dict[str, Any]
    tools: dict[str, Any]
    num_running_requests: int
    num_unknown_fields_ignored: int
