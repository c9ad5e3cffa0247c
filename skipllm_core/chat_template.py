"""A model's chat template: messages in, prompt text out, and users cannot speak for another role.

Message contents may spell control tokens (`<|im_start|>system`). Before rendering, each is put
between two marks that no text contains (Unicode noncharacters); afterwards it is split inside, and
the pieces are encoded one by one, so that it stays the text that it is:

    "a <|im_end|> b"  ->  "a " START "<|im_end|>" END " b"  ->  ["a <", "|im_end|>", " b"]

Control tokens are the tokenizer's special tokens, and the other added tokens that the template
spells. The latter are left alone in what the assistant said: `</think>` is at home there, and
templates look for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from skipllm_core.errors import ConfigError, InvalidRequestError

Message = Mapping[str, str]  # role and content; name and tool_call_id where given

_START, _END, _FINAL = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"[{_START}{_END}{_FINAL}]")


class ChatTemplate:
    """A compiled Jinja template, in the environment that transformers gives it.

    `variables` are what the template may name besides the messages (`bos_token`, `eos_token`).
    Raises ConfigError if the template does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Collection[str],
        added_tokens: Collection[str],
        variables: Mapping[str, str],
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self._knows_developers = "developer" in source
        self._variables = dict(variables)
        self._special = re.compile(_any_of(special_tokens))
        control = _any_of({*special_tokens, *(token for token in added_tokens if token in source)})
        self._control = re.compile(control)
        # The first character of every spelling, overlapping ones included.
        self._control_start = re.compile(f"(?=(?:{control}))(.)", re.DOTALL)
        self._marked = re.compile(f"{_START}({control}){_END}")

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> list[str]:
        """The prompt, in pieces to be encoded one after the other.

        Raises InvalidRequestError where the template refuses the messages.
        """
        marked = [self._mark(message) for message in messages]
        if continue_final_message:
            marked[-1]["content"] += f"{_FINAL} "
        try:
            text = self._template.render(
                messages=marked,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
                **(options or {}),
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = _MARKS.sub("", str(error))[:200]
            raise InvalidRequestError(
                f"The model's chat template refused the messages: {reason}", param="messages"
            ) from error
        if continue_final_message:
            text = _cut_at_final_mark(text)
        text = self._marked.sub(lambda m: self._split_inside(m[1]) + _END, text)
        return [piece for piece in _MARKS.split(text) if piece]

    def _mark(self, message: Message) -> dict[str, str]:
        control = self._special if message["role"] == "assistant" else self._control
        marked = {
            key: control.sub(f"{_START}\\g<0>{_END}", _MARKS.sub("", value))
            for key, value in message.items()
        }
        if marked["role"] == "developer" and not self._knows_developers:
            marked["role"] = "system"
        return marked

    def _split_inside(self, spelling: str) -> str:
        return self._control_start.sub(f"\\g<1>{_START}", spelling)


def _cut_at_final_mark(text: str) -> str:
    """The prompt up to the end of the last message, without the template's end of turn."""
    head, mark, tail = text.rpartition(_FINAL)
    if not mark:
        raise InvalidRequestError(
            "continue_final_message is set, but the chat template does not show the final message",
            param="continue_final_message",
        )
    # The mark came with a space: a template that trims contents has taken that away.
    return head if tail.startswith(" ") else head.rstrip()


def _any_of(spellings: Collection[str]) -> str:
    """A pattern for any of them, longest first."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which models have not seen."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_of(tokenizer_config: Mapping[str, Any], jinja_file: str | None) -> str | None:
    """The template's source: chat_template.jinja, or what tokenizer_config.json holds (one, or
    several by name of which `default` is taken)."""
    if jinja_file is not None:
        return jinja_file
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        by_name = {entry.get("name"): entry.get("template") for entry in found}
        found = by_name.get("default")
    return found if isinstance(found, str) else None
