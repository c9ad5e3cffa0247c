"""llama.cpp's grammars (GBNF) as Lark, through llguidance's translation, which some of them need to
be written otherwise for."""

from __future__ import annotations

import re
from collections.abc import Iterator

from llguidance.gbnf_to_lark import gbnf_to_lark

_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_LARK = re.compile(r"^[ \t]*(%llguidance\b|start[ \t]*:)", re.MULTILINE)
_TOKEN = re.compile(
    r"""
    (?P<text> "(?:\\.|[^"\\])*"? | \[(?:\\.|[^\]\\])*\]? )
    | (?P<comment> \#[^\n]* )
    | (?P<times> [*+?] | \{[\d,\s]*\} )
    | (?P<close> \) )
    | (?P<name> [\w-]+ )
    | (?P<space> \s+ )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_TIMES_FOLLOW = re.compile(r"[ \t]*[*+?{]")
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def is_gbnf(text: str) -> bool:
    """Whether it is to be read as GBNF: unless it is Lark, anything is."""
    return bool(_RULE.search(text)) or not _LARK.search(text)


def lark_of(text: str) -> str:
    """Raises Exception (llguidance has nothing narrower) if it is no GBNF."""
    return str(gbnf_to_lark("".join(_rewritten(text))))


def _rewritten(text: str) -> Iterator[str]:
    is_repeated = False  # what stands last, whatever the parentheses around it
    for token in _TOKEN.finditer(text):
        kind, found = token.lastgroup, token[0]
        if kind == "text":
            found = _ESCAPE.sub(_character, found)
        elif kind == "name" and found == "start":
            found = "start-rule"  # the root's name in Lark
        elif kind == "close" and is_repeated and _TIMES_FOLLOW.match(text, token.end()):
            # Or else the parentheses would be left out, and ("a"*)* become "a"**.
            found = ' "")'
        if kind not in ("space", "comment", "close"):
            is_repeated = kind == "times"
        yield found


def _character(escape: re.Match[str]) -> str:
    """Code points are translated as if they had no leading zeros, which Lark does not read."""
    digits = escape[1] or escape[2]
    number = int(digits, 16) if digits else None
    if number is None or 0xD800 <= number < 0xE000 or number > 0x10FFFF:
        return escape[0]
    return chr(number) if number > 0xFF else f"\\x{number:02x}"
