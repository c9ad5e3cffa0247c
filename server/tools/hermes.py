"""Calls as Hermes and Qwen write them:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Small models leave the tags out, or write ``` instead, so an answer may also begin with the bare
objects.
"""

from __future__ import annotations

from server.tools.calls import Calls, read_call, release
from server.tools.source import Script, Source

BEGIN, END, FENCE = "<tool_call>", "</tool_call>", "```"


def read(source: Source, calls: Calls) -> Script[None]:
    yield from source.hold_spaces()
    if (yield from source.hold_literal(FENCE)):
        yield from source.hold_literal("json")
        yield from source.hold_spaces()
    while (yield from _read_call(source, calls, FENCE, END)):
        yield from source.hold_spaces()
    release(source, calls)
    while (yield from source.until([BEGIN], calls.content)):
        yield from source.hold_spaces()
        yield from _read_call(source, calls, END)
        release(source, calls)


def _read_call(source: Source, calls: Calls, *ends: str) -> Script[bool]:
    is_call = (yield from source.hold_literal("{")) and (yield from read_call(source, calls))
    if is_call:
        yield from source.hold_spaces()
        if (yield from source.hold_literal(*ends)):
            source.held()
    return bool(is_call)
