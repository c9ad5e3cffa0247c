"""What translations of another API to a chat share: the chat's messages in the making, and its
faults in the names that the client used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from server.errors import ErrorReply
from server.protocol.chat import ChatRequest
from server.protocol.validation import first_fault, unsupported
from skipllm_core.errors import ContextLengthError, InvalidRequestError

# Parameters beyond OpenAI's and Anthropic's that every endpoint takes by the chat's name.
EXTENSIONS = frozenset(
    {
        "chat_template_kwargs", "frequency_penalty", "grammar", "guided_choice", "guided_grammar",
        "guided_json", "guided_regex", "guided_whitespace_pattern", "ignore_eos",
        "include_stop_str_in_output", "json_schema", "logit_bias", "min_p", "min_tokens",
        "presence_penalty", "repetition_penalty", "seed", "skip_special_tokens", "stop",
        "stop_token_ids", "structured_outputs", "top_k", "truncate_prompt_tokens",
    }
)  # fmt: skip


class ChatMessages:
    """A chat's messages in the making. `names` tells where each stood in the client's request."""

    def __init__(self, root: str) -> None:
        self.wire: list[dict[str, Any]] = []
        self.names = {"messages": root}
        self._reasoning: list[str] = []

    def say(self, role: str, texts: Sequence[str], path: str, *, joins: bool = False) -> None:
        """A message of `role`; with `joins`, one turn with a message of that role before it."""
        parts = [{"type": "text", "text": text} for text in texts]
        if joins and self._is_turn_of(role):
            self.wire[-1]["content"] += parts
        else:
            self._add({"role": role, "content": parts}, path)

    def call(self, call_id: str, name: str, arguments: str, path: str) -> None:
        """A tool call; it belongs to the assistant's message before it, if there is one."""
        if not self._is_turn_of("assistant"):
            self._add({"role": "assistant", "content": None}, path)
        calls = self.wire[-1].setdefault("tool_calls", [])
        place = f"messages[{len(self.wire) - 1}].tool_calls[{len(calls)}]"
        self.names |= {place: path, f"{place}.function": path}
        function = {"name": name, "arguments": arguments}
        calls.append({"id": call_id, "type": "function", "function": function})

    def result(self, call_id: str, texts: Sequence[str], path: str) -> None:
        self._add({"role": "tool", "tool_call_id": call_id}, path)
        self.wire[-1]["content"] = [{"type": "text", "text": text} for text in texts]

    def reason(self, text: str) -> None:
        """Reasoning that goes before the assistant's next message."""
        self._reasoning.append(text)

    def _is_turn_of(self, role: str) -> bool:
        return bool(self.wire) and self.wire[-1]["role"] == role and not self._reasoning

    def _add(self, message: dict[str, Any], path: str) -> None:
        if self._reasoning and message["role"] == "assistant":
            message["reasoning_content"] = "".join(self._reasoning)
        self._reasoning.clear()
        self.names[f"messages[{len(self.wire)}]"] = path
        self.wire.append(message)


def passed_on(
    extra: Mapping[str, object] | None, moved: Mapping[str, str], own: frozenset[str] = EXTENSIONS
) -> dict[str, object]:
    """What of a request's further fields the chat is to judge: extensions, and what no API knows.
    A field of chats that this API has under another name (`moved`), or not at all, is refused."""
    fields = dict(extra or {})
    for name, value in fields.items():
        if value is not None and name not in own:
            if name in moved:
                raise InvalidRequestError(
                    f"Unsupported parameter: '{name}'. In this API it is '{moved[name]}'.",
                    param=name,
                    code="unsupported_parameter",
                )
            if name in ChatRequest.model_fields:
                raise unsupported(name)
    return fields


@contextmanager
def in_the_clients_names(names: Mapping[str, str]) -> Iterator[None]:
    """Faults of the chat that a request became, told in the request's own field names. `names`
    maps paths of the chat, and with them all that is below, to paths of the request."""
    try:
        yield
    except ValidationError as error:
        fault = first_fault([{**e, "loc": ("body", *e["loc"])} for e in error.errors()[:1]])
        raise _renamed(fault, names) from None
    except ContextLengthError:
        raise
    except InvalidRequestError as error:
        raise _renamed(error, names) from None


def in_the_clients_words(reply: ErrorReply, names: Mapping[str, str]) -> ErrorReply:
    """The same of a failure in the middle of a stream."""
    if reply.param is None:
        return reply
    param = _name_of(reply.param, names)
    return replace(reply, message=_reworded(reply.message, reply.param, param), param=param)


def _renamed(error: InvalidRequestError, names: Mapping[str, str]) -> InvalidRequestError:
    if error.param is None:
        return error
    param = _name_of(error.param, names)
    message = _reworded(str(error), error.param, param)
    return InvalidRequestError(message, param=param, code=error.code)


def _reworded(message: str, param: str, new_param: str) -> str:
    return message.replace(f"'{param}'", f"'{new_param}'")


def _name_of(param: str, names: Mapping[str, str]) -> str:
    """The client's name of the longest part that has one, with what is below it."""
    end = len(param)
    while end > 0:
        if param[:end] in names:
            return names[param[:end]] + param[end:]
        end = max(param.rfind(".", 0, end), param.rfind("[", 0, end))
    return param
