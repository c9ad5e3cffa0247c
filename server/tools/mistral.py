"""Calls as Mistral's models write them, the older and the newer ones:

[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": ..}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]..
"""

from __future__ import annotations

from server.tools.calls import Calls, read_arguments, read_call, release
from server.tools.source import Script, Source

BEGIN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


def read(source: Source, calls: Calls) -> Script[None]:
    while (yield from source.until([BEGIN], calls.content)):
        yield from source.hold_spaces()
        match (yield from source.peek()):
            case "[":
                yield from _read_list(source, calls)
            case "{":
                source.hold_char()
                yield from read_call(source, calls)
            case _:
                yield from _read_named(source, calls)
        release(source, calls)


def _read_list(source: Source, calls: Calls) -> Script[None]:
    source.hold_char()
    yield from source.hold_spaces()
    while (yield from source.hold_literal("{")) and (yield from read_call(source, calls)):
        yield from source.hold_spaces()
        if not (yield from source.hold_literal(",")):
            if (yield from source.hold_literal("]")):
                source.held()
            return
        yield from source.hold_spaces()


def _read_named(source: Source, calls: Calls) -> Script[None]:
    name = yield from source.hold_name()
    if not calls.knows(name):
        return
    yield from source.hold_spaces()
    marker = yield from source.hold_literal(ID, ARGUMENTS)
    if marker == ID:
        yield from source.hold_name()
        yield from source.hold_literal(ARGUMENTS)
    yield from source.hold_spaces()
    if (yield from read_arguments(source, calls, name)):
        calls.end()
