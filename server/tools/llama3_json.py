"""Calls as Llama 3.x writes them, with or without `<|python_tag|>` before; several by semicolons:

{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": ..}
"""

from __future__ import annotations

from server.tools.calls import Calls, read_call, release
from server.tools.source import Script, Source

BEGIN, SEPARATOR = "<|python_tag|>", "; "


def read(source: Source, calls: Calls) -> Script[None]:
    while marker := (yield from source.until([BEGIN, "{"], calls.content)):
        yield from source.hold_spaces()
        is_object = marker == "{" or (yield from source.hold_literal("{"))
        while is_object and (yield from read_call(source, calls)):
            yield from source.hold_spaces()
            yield from source.hold_literal(SEPARATOR.strip())
            yield from source.hold_spaces()
            is_object = yield from source.hold_literal("{")
        release(source, calls)
