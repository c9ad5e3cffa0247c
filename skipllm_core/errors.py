"""The exception tree of the engine: what a caller can do about each, and nothing of HTTP."""

from __future__ import annotations


class SkipLLMError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(SkipLLMError):
    """Settings that cannot work; raised while starting, with what to change in the message."""


class UnsupportedModelError(ConfigError):
    """A checkpoint that is not one of the supported families, or not safe to load."""


class ProfileError(ConfigError):
    """A skip profile that is malformed or belongs to another model."""


class InvalidRequestError(SkipLLMError):
    """A request that can never succeed as it is; the client has to change it.

    `param` names the offending field in the caller's vocabulary; `code` is OpenAI's error code.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """A prompt that leaves no room for one generated token.

    `is_lower_bound`: it was refused by its size alone, and has `num_prompt_tokens` at least.
    """

    def __init__(
        self, *, max_model_len: int, num_prompt_tokens: int, is_lower_bound: bool = False
    ) -> None:
        self.max_model_len = max_model_len
        self.num_prompt_tokens = f"{'at least ' if is_lower_bound else ''}{num_prompt_tokens}"
        super().__init__(self.message_for("prompt"), code="context_length_exceeded")

    def message_for(self, what: str) -> str:
        """OpenAI's words, with what the client calls its prompt; clients look for the first."""
        return (
            f"This model's maximum context length is {self.max_model_len} tokens. However, your "
            f"{what} resulted in {self.num_prompt_tokens} tokens. Please reduce the length of the "
            f"{what}."
        )


class OverloadedError(SkipLLMError):
    """The queue is full, or the engine is not accepting work just now; worth a retry."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(SkipLLMError):
    """The worker died while this request was under way; its tokens are lost."""
