"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from server.protocol.base import GenerationRequest, wrong

MAX_PROMPTS = 1024

Prompt = str | list[int]  # text, or token ids


def _prompts(value: Any) -> Any:
    """The four forms of `prompt` (text, texts, ids, lists of ids), all as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong("prompt_type", "", value)
    if not value:
        raise wrong("too_short", "", value)
    if type(value[0]) is int:
        _check_ids(value, "")
        return [value]
    if len(value) > MAX_PROMPTS:
        raise wrong("too_long", "", value, max_length=MAX_PROMPTS)
    for index, prompt in enumerate(value):
        if type(prompt) is not type(value[0]) or not isinstance(prompt, str | list):
            raise wrong("prompt_type", f"[{index}]", prompt)
        if isinstance(prompt, list):
            _check_ids(prompt, f"[{index}]")
    return value


def _check_ids(ids: list[Any], path: str) -> None:
    if not ids:
        raise wrong("too_short", path, ids)
    for index, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise wrong("int_type", f"{path}[{index}]", token_id)
        if token_id < 0:
            raise wrong("greater_than_equal", f"{path}[{index}]", token_id, ge=0)


class CompletionRequest(GenerationRequest):
    # Checked by `_prompts`: a union's own errors would name every form that it is not.
    prompt: Annotated[
        list[Any], BeforeValidator(_prompts, str | list[str] | list[int] | list[list[int]])
    ]
    """A text, an array of texts, token ids, or an array of arrays of token ids."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most tokens to generate; 0, for the prompt alone, with `echo` or `prompt_logprobs`."""
    add_special_tokens: bool | None = None
    """Whether tokens as the begin of a sequence are added to a text; they are by default."""
    echo: bool | None = None
    """Whether the answer begins with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """How many of the likeliest tokens to tell at each place, besides the chosen one."""

    @property
    def prompts(self) -> list[Prompt]:
        return self.prompt
