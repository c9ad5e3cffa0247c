"""Request fields beyond the models: refused if they would change the answer, else ignored aloud."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from server.protocol.validation import unknown, unsupported

logger = logging.getLogger(__name__)

_MAX_NAMES = 100  # that are remembered, so that clients cannot fill the memory with names


def _is_false(value: object) -> bool:
    return not value


# Parameters of OpenAI's and vLLM's APIs that this server does not implement, and the values that
# ask for nothing. `None` never asks for anything.
_UNSUPPORTED: dict[str, Callable[[object], bool]] = {
    "add_special_tokens": _is_false,  # of chats: their template says where such tokens stand
    "allowed_token_ids": _is_false,
    "audio": _is_false,
    "bad_words": _is_false,
    "best_of": lambda value: value == 1,
    "chat_template": _is_false,
    "documents": _is_false,
    "echo": _is_false,  # of chats
    "function_call": lambda value: value in ("none", "auto"),
    "functions": _is_false,
    "length_penalty": lambda value: value == 1,
    "logits_processors": _is_false,
    "modalities": lambda value: value == ["text"],
    "prediction": _is_false,
    "priority": lambda value: value == 0,
    "prompt_embeds": _is_false,
    "prompt_logprobs": lambda value: value is False,
    "return_token_strs": _is_false,
    "return_tokens_as_token_ids": _is_false,
    "reasoning_effort": lambda value: value == "none",
    "spaces_between_special_tokens": lambda value: value is True,
    "suffix": _is_false,
    "tool_choice": lambda value: value in ("none", "auto"),
    "tools": _is_false,
    "use_beam_search": _is_false,
    "verbosity": lambda value: value == "medium",
    "web_search_options": lambda value: False,
}
# Fields that never change the answer of this server.
_IGNORED = frozenset(
    {
        "cache_salt", "guided_decoding_backend", "include_reasoning", "metadata",
        "parallel_tool_calls",
        "prompt_cache_key", "prompt_cache_retention",
        "safety_identifier", "service_tier", "store", "user",
    }
)  # fmt: skip


class UnknownFields:
    """Unknown fields that requests bore: how many, and each name once in the log."""

    def __init__(self, *, is_strict: bool = False) -> None:
        self.num_ignored = 0
        self._is_strict = is_strict
        self._seen: set[str] = set()

    def check(self, extra: Mapping[str, object] | None) -> None:
        """Raises InvalidRequestError for what is not supported, and, if strict, for the unknown."""
        for name, value in (extra or {}).items():
            asks_nothing = _UNSUPPORTED.get(name)
            if value is None or name in _IGNORED:
                continue
            if asks_nothing is not None:
                if not asks_nothing(value):
                    raise unsupported(name)
            elif self._is_strict:
                raise unknown(name[:64])
            else:
                self._ignore(name[:64])

    def _ignore(self, name: str) -> None:
        self.num_ignored += 1
        if name not in self._seen and len(self._seen) < _MAX_NAMES:
            self._seen.add(name)
            logger.warning("ignoring the unknown request field %r", name)
