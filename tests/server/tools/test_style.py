"""What is found out about a model's chat template, and how conversations are put to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from server.protocol.chat import ChatRequest
from server.settings import ToolCallParser
from server.tools.families import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED, family_of
from server.tools.prompting import prompt_of
from server.tools.reading import tools_told
from server.tools.style import ChatStyle, History
from skipllm_core.tokenizer import ByteTokenizer, HFTokenizer
from tests.tokenizer_families import MISTRAL as MISTRAL_TEMPLATE
from tests.tokenizer_families import pair, save

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
SHORT_IDS_ONLY = """\
{%- for message in messages if message.role == 'tool' and message.tool_call_id|length != 9 %}
    {{- raise_exception('Tool call IDs should be nine letters and digits!') }}
{%- endfor %}
"""
TEXT_ONLY = """\
{{- (tools or '')|string }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + call.function.arguments + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
"""


def call(*cities: str, text: str | None = None, ids: str = "call_") -> dict[str, Any]:
    calls = [
        {
            "id": f"{ids}{index}",
            "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps({"city": city})},
        }
        for index, city in enumerate(cities)
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def result(text: str, index: int = 0, ids: str = "call_") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"{ids}{index}", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def style_of(name: str, folder: Path, template: str | None = None, **options: Any) -> ChatStyle:
    return ChatStyle.of(tokenizer_of(name, folder, template), **options)


def tokenizer_of(name: str, folder: Path, template: str | None = None) -> HFTokenizer:
    save(name, folder)
    if template is None:
        return HFTokenizer(folder)
    (folder / "mine.jinja").write_text(template)
    return HFTokenizer(folder, chat_template=folder / "mine.jinja")


def prompt(
    tokenizer: HFTokenizer | ByteTokenizer, messages: list[dict[str, Any]], tools: Any = TOOLS
) -> list[int]:
    """As a request's prompt is made."""
    body = ChatRequest.model_validate({"messages": messages, "tools": tools})
    told = [tool.for_template() for tool in tools_told(body)]
    made = prompt_of(ChatStyle.of(tokenizer), body.messages_for_template, told)
    return tokenizer.encode_chat(made.messages, tools=made.tools)


@pytest.mark.parametrize(
    ("name", "family", "knows_tools"),
    [
        ("qwen3", HERMES, True),
        ("llama31", LLAMA3_JSON, True),
        ("mistral", MISTRAL, True),
        ("chatml", HERMES, False),
        ("smollm2", HERMES, False),
        ("llama2", HERMES, False),
    ],
)
def test_a_template_shows_what_it_can(
    tmp_path: Path, name: str, family: Any, knows_tools: bool
) -> None:
    style = style_of(name, tmp_path)
    assert style.family is family
    assert (style.history is not None) == knows_tools
    assert style.summary()["template"] is knows_tools
    assert style.summary()["parser"] == family.name


@pytest.mark.parametrize("given", ["hermes", "llama3_json", "mistral", "none"])
def test_a_parser_that_is_named_is_used(tmp_path: Path, given: ToolCallParser) -> None:
    style = style_of("qwen3", tmp_path, parser=given)
    assert style.summary()["parser"] == given
    assert style.summary()["template"] is True


def test_tools_in_a_form_that_nobody_can_read_are_told_in_ours(tmp_path: Path) -> None:
    strange = TEXT_ONLY.replace("tool_call>", "odd>")
    assert style_of("chatml", tmp_path, strange).summary()["template"] is False
    assert style_of("chatml", tmp_path, strange, parser="hermes").summary()["template"] is True


def test_families_are_told_apart_by_their_templates() -> None:
    assert family_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}") is MISTRAL_NAMED
    assert family_of('form {"name": function name, "parameters": dictionary of ...}') is LLAMA3_JSON
    assert family_of("{{ '<|python_tag|>' }}") is LLAMA3_JSON
    assert family_of('{"name": x, "description": y}') is None


def test_reasoning_is_found_in_the_template(tmp_path: Path) -> None:
    assert style_of("qwen3", tmp_path).has_reasoning
    assert not style_of("qwen3", tmp_path, reasoning_parser="none").has_reasoning
    assert not ChatStyle.of(ByteTokenizer()).has_reasoning
    assert ChatStyle.of(ByteTokenizer(), reasoning_parser="think").has_reasoning


def test_markers_that_are_special_tokens_are_shown_to_parsers(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("mistral", tmp_path)
    (token_id,) = tokenizer.encode("[TOOL_CALLS]", add_special_tokens=False)
    assert ChatStyle.of(tokenizer).shown_tokens == {token_id: "[TOOL_CALLS]"}
    assert style_of("qwen3", tmp_path / "qwen").shown_tokens == {}


CHATS = {
    "tools": [user("hi")],
    "a call": [user("w?"), call("Paris"), result("21"), user("and?")],
    "a call and text": [user("w?"), call("Köln", text="Let me see."), result("21")],
    "a result in parts": [user("w?"), call("Rome"), result("x")],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["qwen3", "llama31", "mistral"])
def test_conversations_with_tools_are_rendered_as_by_transformers(
    tmp_path: Path, name: str, chat: str
) -> None:
    ours, theirs = pair(name, tmp_path)
    messages = [
        {**message, "content": message["content"] or ""}
        | (
            {"tool_calls": [_parsed(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else {}
        )
        for message in CHATS[chat]
    ]
    expected = theirs.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True)
    assert prompt(ours, CHATS[chat]) == expected["input_ids"]


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}


def test_several_calls_are_told_one_by_one_where_a_template_wants_that(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("llama31", tmp_path)
    both = [user("w?"), call("Paris", "Rome"), result("r", 1), result("p", 0), user("and?")]
    each = [user("w?"), call("Paris"), result("p"), call("Rome"), result("r"), user("and?")]
    assert prompt(tokenizer, both) == prompt(tokenizer, each)
    lost = [user("w?"), call("Paris", "Rome"), result("p", 0)]
    assert prompt(tokenizer, lost) == prompt(tokenizer, each[:4])


def test_ids_are_nine_letters_and_digits_where_a_template_wants_that(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("mistral", tmp_path, SHORT_IDS_ONLY + MISTRAL_TEMPLATE)
    style = ChatStyle.of(tokenizer)
    assert style.history is not None
    assert style.history.has_short_ids
    text = tokenizer.decode(prompt(tokenizer, [user("w?"), call("Paris"), result("21")]))
    first, second = re.findall(r'"(?:call_)?id": "([A-Za-z0-9]{9})"', text)
    assert first == second
    kept = [user("w?"), call("Paris", ids="abcdefgh"), result("21", ids="abcdefgh")]
    assert tokenizer.decode(prompt(tokenizer, kept)).count("abcdefgh0") == 2


def test_arguments_stay_text_where_a_template_wants_that(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml", tmp_path, TEXT_ONLY)
    style = ChatStyle.of(tokenizer)
    assert style.history is not None
    assert style.history.arguments == "text"
    text = tokenizer.decode(prompt(tokenizer, [user("w?"), call("Paris"), result("21")]))
    assert 'get_weather{"city": "Paris"}' in text


def test_arguments_that_are_no_object_are_shown_as_they_are(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3", tmp_path)
    for arguments in ("[1]", "{", "[" * 5000):
        said = call("x")
        said["tool_calls"][0]["function"]["arguments"] = arguments
        assert arguments[:60] in tokenizer.decode(prompt(tokenizer, [user("w?"), said]))


@pytest.mark.parametrize("name", ["smollm2", "llama2", "bytes"])
def test_a_model_without_tools_is_told_of_them_in_text(tmp_path: Path, name: str) -> None:
    tokenizer = ByteTokenizer() if name == "bytes" else HFTokenizer(save(name, tmp_path))
    text = tokenizer.decode(
        prompt(tokenizer, [user("w?"), call("Paris", text="Hm."), result("21"), result("c", 1)])
    )
    assert json.dumps(TOOLS[0]) in text
    assert '<tool_call>\n{"name": "<name>", "arguments": {<arguments>}}\n</tool_call>' in text
    said = 'Hm.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert said in text
    told = "<tool_response>\n21\n</tool_response>\n<tool_response>\nc\n</tool_response>"
    assert told in text


def test_our_text_joins_the_systems(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save("smollm2", tmp_path))
    text = tokenizer.decode(
        prompt(tokenizer, [{"role": "system", "content": "Be kind."}, user("w?")])
    )
    assert text.count("<|im_start|>system") == 1
    assert "Be kind.\n\nYou can call these functions:" in text


def test_without_tools_nothing_is_told_of_them(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save("smollm2", tmp_path))
    assert prompt(tokenizer, [user("hi")], None) == tokenizer.encode_chat([user("hi")])
    body = {"messages": [user("hi")], "tools": TOOLS, "tool_choice": "none"}
    assert tools_told(ChatRequest.model_validate(body)) == []


def test_reasoning_of_past_turns_reaches_the_template(tmp_path: Path) -> None:
    ours, theirs = pair("qwen3", tmp_path)
    messages = [user("w?"), {**call("Paris", text=""), "reasoning_content": "Hm."}, result("21")]
    rendered = [
        messages[0],
        {**messages[1], "tool_calls": [_parsed(messages[1]["tool_calls"][0])]},
        messages[2],
    ]
    expected = theirs.apply_chat_template(rendered, tools=TOOLS, add_generation_prompt=True)
    assert prompt(ours, messages) == expected["input_ids"]
    renamed = {key.replace("_content", ""): value for key, value in messages[1].items()}
    assert "reasoning" in renamed
    renamed["content"] = ""
    assert prompt(ours, [messages[0], renamed, messages[2]]) == expected["input_ids"]


def test_a_template_of_the_users_is_used_instead(tmp_path: Path) -> None:
    style = style_of("smollm2", tmp_path, TEXT_ONLY)
    assert isinstance(style.history, History)
