"""A model's chat template: messages in, prompt text out, and what in it the template wrote itself.

What the messages and tools say is `Tainted` with who said it, so that whoever encodes the prompt
knows which of it may be a control token: see `control_tokens.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.tainted import Marks, Origin, Tainted, plain, spans_of

# role and content; name, tool_call_id, tool_calls, ... where given
Message = Mapping[str, Any]

_INSTRUCTORS = ("system", "developer", "assistant", "tool")
_ROLES = (*_INSTRUCTORS, "user")
_OPAQUE = ("indent", "title", "urlize", "wordwrap")  # filters that would keep some of the spans
_BLANK_END = "\ufdd2 "  # what a blank message ends with that is continued, to be found again


class ChatTemplate:
    """A compiled Jinja template, in the environment that transformers gives it.

    `variables` are what the template may name besides the messages (`bos_token`, `eos_token`).
    Raises ConfigError if the template does not compile.
    """

    def __init__(self, source: str, *, variables: Mapping[str, str]) -> None:
        self._marks = Marks()
        environment = _Environment(self._marks)
        try:
            self._template = environment.from_string(source)
            named = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self.source = source
        self.undefined_tokens = sorted(
            name for name in named if name.endswith("_token") and name not in variables
        )
        self._knows_developers = "developer" in source
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt, which is Tainted where it is not the template's own.

        Raises InvalidRequestError where the template refuses the messages.
        """
        tainted = [self._taint(message) for message in messages]
        final = self._taint_final(tainted[-1]) if continue_final_message else None
        try:
            text = self._template.render(
                messages=tainted,
                tools=self._marks.taint(tools, Origin.INSTRUCTOR),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
                **self._marks.taint(options or {}, Origin.INSTRUCTOR),
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = plain(self._marks.read(str(error)))[:200]
            raise InvalidRequestError(
                f"The model's chat template refused the messages: {reason}", param="messages"
            ) from error
        return text if final is None else _up_to_final(text, final)

    def _taint(self, message: Message) -> dict[str, Any]:
        tainted: dict[str, Any] = self._marks.taint(message, _origin(message))
        if message["role"] in _ROLES:  # nobody's words, and `<|{{ role }}|>` may be a token
            tainted["role"] = message["role"]
        if message["role"] == "developer" and not self._knows_developers:
            tainted["role"] = "system"
        return tainted

    def _taint_final(self, message: dict[str, Any]) -> str:
        """Has the end of the message's text found again, which is returned."""
        holder, key = message, "content"
        if isinstance(message.get("content"), list):
            texts = [part for part in message["content"] if isinstance(part.get("text"), str)]
            holder, key = (texts[-1], "text") if texts else (message, "content")
        content = holder.get(key)
        if not isinstance(content, str):
            raise InvalidRequestError(
                "continue_final_message is set, but the final message has no text",
                param="continue_final_message",
            )
        shown = content if content.strip() else content + _BLANK_END
        holder[key] = self._marks.taint(shown, _origin(message) | Origin.FINAL)
        return plain(content)


def _origin(message: Message) -> Origin:
    return Origin.INSTRUCTOR if message["role"] in _INSTRUCTORS else Origin.USER


class _CodeGenerator(CodeGenerator):
    """Has `a ~ b` joined by the environment, as all other output is."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - Jinja's
        self.write("environment.concat((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, in which the spans of tainted texts survive.

    Output, macros and blocks are joined by `concat`. A filter or method of str that makes an
    ordinary str of a tainted text gives one that is tainted as a whole.
    """

    code_generator_class = _CodeGenerator

    def __init__(self, marks: Marks) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        self._marks = marks
        self.filters |= {"tojson": _to_json, "replace": self._replace}
        self.filters = {
            name: self._opaque(function) if name in _OPAQUE else self._tracked(function)
            for name, function in self.filters.items()
        }
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def concat(self, parts: Iterable[object]) -> str:
        return self._marks.read("".join(map(str, parts)))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if not isinstance(owner, str):
            result = super().call(context, function, *args, **kwargs)
            return self._marks.read(result) if type(result) is str else result
        if not isinstance(owner, Tainted):  # whose methods keep the spans of their arguments
            function = getattr(Tainted(owner, (), self._marks), function.__name__)
        result = super().call(context, function, *args, **kwargs)
        return self._kept(result, owner, *args, *kwargs.values())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, Tainted):
            return super().wrap_str_format(value)
        formatted = super().wrap_str_format(getattr(plain(owner), value.__name__))
        return formatted and (lambda *args, **kw: self._kept(formatted(*args, **kw), owner))

    def _tracked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def tracked(*args: Any, **kwargs: Any) -> Any:
            return self._kept(function(*args, **kwargs), *args, *kwargs.values())

        return tracked

    def _opaque(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def opaque(*args: Any, **kwargs: Any) -> Any:
            result = function(
                *(plain(arg) if isinstance(arg, Tainted) else arg for arg in args), **kwargs
            )
            return self._kept(result, *args, *kwargs.values())

        return opaque

    def _kept(self, result: Any, *sources: object) -> Any:
        if not isinstance(result, str) or isinstance(result, Tainted):
            return result
        return self._marks.whole(result, *sources)

    def _replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        """Jinja's own replaces in `str(text)`, marks and all."""
        tracked, found, new = (self._marks.read(str(value)) for value in (text, old, new))
        count = -1 if count is None else count
        return self._marks.join([tracked]).replace(plain(found), new, count)


def _up_to_final(text: str, content: str) -> str:
    """The prompt up to the end of the last message, whose text is `content`, without the
    template's end of turn. White space that the template trims is left out, as by transformers:
    unless a space of its own stands there."""
    ends = [span.end for span in spans_of(text) if Origin.FINAL in span.origin]
    if not ends:
        raise InvalidRequestError(
            "continue_final_message is set, but the chat template does not show the final message",
            param="continue_final_message",
        )
    end = ends[-1]
    if not content.strip():
        end = plain(text).rindex(_BLANK_END[0], 0, end)
        is_trimmed = text[end + 1 : end + 2] != _BLANK_END[1]
        return text[:end].rstrip() if is_trimmed else text[:end]
    head = text[:end]
    space = content[len(content.rstrip()) :]
    is_trimmed = not head.endswith(space)
    return head + space if is_trimmed and text[end : end + 1] == " " else head


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which models have not seen. Raises as json.dumps does."""
    return json.dumps(
        _marked(value, sort_keys=sort_keys),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
    )


def _marked(value: object, *, sort_keys: bool) -> object:
    """The value with the spans of its strings written into them."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        keys = sorted(value) if sort_keys else value
        return {_marked(k, sort_keys=False): _marked(value[k], sort_keys=sort_keys) for k in keys}
    if isinstance(value, list | tuple):
        return [_marked(item, sort_keys=sort_keys) for item in value]
    return value


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


def template_of(
    tokenizer_config: Mapping[str, Any], jinja_file: str | None, name: str = "default"
) -> str | None:
    """The source of the template of that name: the file's, or what tokenizer_config.json holds
    (one, which is the default, or several by name)."""
    if jinja_file is not None:
        return jinja_file
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = {entry.get("name"): entry.get("template") for entry in entries}
    elif not isinstance(found, dict):
        found = {"default": found}
    source = found.get(name)
    return source if isinstance(source, str) else None
