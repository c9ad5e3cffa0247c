"""How conversations of other APIs become a chat's messages, and its faults theirs."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import ErrorReply
from server.protocol.chat import ChatRequest
from server.translation import ChatMessages, in_the_clients_names, in_the_clients_words
from skipllm_core.errors import InvalidRequestError


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def test_calls_belong_to_what_the_assistant_says_before_them() -> None:
    messages = ChatMessages("input")
    messages.say("user", ["U"], "input[0]")
    messages.reason("R")
    messages.say("assistant", ["A"], "input[2]")
    messages.call("c1", "f", "{}", "input[3]")
    messages.call("c2", "g", "{}", "input[4]")
    messages.result("c1", ["one"], "input[5]")
    messages.result("c2", ["two", "lines"], "input[6]")
    messages.call("c3", "f", "{}", "input[7]")
    assert messages.wire == [
        {"role": "user", "content": text("U")},
        {
            "role": "assistant",
            "content": text("A"),
            "reasoning_content": "R",
            "tool_calls": [call("c1", "f", "{}"), call("c2", "g", "{}")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": text("one")},
        {"role": "tool", "tool_call_id": "c2", "content": text("two", "lines")},
        {"role": "assistant", "content": None, "tool_calls": [call("c3", "f", "{}")]},
    ]


def test_reasoning_begins_a_turn_and_belongs_to_no_other_speaker() -> None:
    messages = ChatMessages("input")
    messages.call("c1", "f", "{}", "input[0]")
    messages.reason("R")
    messages.call("c2", "f", "{}", "input[2]")
    messages.reason("lost")
    messages.say("user", ["U"], "input[4]")
    messages.say("assistant", ["A"], "input[5]")
    assert [message.get("reasoning_content") for message in messages.wire] == [
        None,
        "R",
        None,
        None,
    ]


def test_text_of_one_role_may_join() -> None:
    messages = ChatMessages("messages")
    messages.say("user", ["A"], "messages[0]", joins=True)
    messages.say("user", ["B"], "messages[1]", joins=True)
    messages.say("assistant", ["C"], "messages[2]", joins=True)
    assert [message["content"] for message in messages.wire] == [text("A", "B"), text("C")]


@pytest.mark.parametrize(
    ("param", "name"),
    [
        ("messages", "input"),
        ("messages[0]", "input[0]"),
        ("messages[1].content", "input[2].content"),
        ("messages[1].tool_calls[0].function.name", "input[3].name"),
        ("messagesque", "messagesque"),
        ("seed", "seed"),
    ],
)
def test_the_longest_part_that_has_a_name_is_renamed(param: str, name: str) -> None:
    messages = ChatMessages("input")
    messages.say("user", ["U"], "input[0]")
    messages.say("assistant", ["A"], "input[2]")
    messages.call("c1", "f", "{}", "input[3]")
    with pytest.raises(InvalidRequestError) as raised, in_the_clients_names(messages.names):
        raise InvalidRequestError(f"Invalid '{param}': so.", param=param, code="invalid_value")
    assert raised.value.param == name
    assert str(raised.value) == f"Invalid '{name}': so."
    reply = in_the_clients_words(ErrorReply(400, f"Invalid '{param}'.", param), messages.names)
    assert (reply.message, reply.param) == (f"Invalid '{name}'.", name)


def test_a_fault_of_the_chat_is_told_in_the_clients_name() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 0}
    names = {"max_completion_tokens": "max_output_tokens"}
    with pytest.raises(InvalidRequestError) as raised, in_the_clients_names(names):
        ChatRequest.model_validate(body)
    assert raised.value.param == "max_output_tokens"
    assert "'max_output_tokens'" in str(raised.value)
