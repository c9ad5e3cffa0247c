"""The families of models by how they write calls: each can be read, written and enforced."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from server.tools import hermes, llama3_json, mistral
from server.tools.calls import Reader

FamilyName = Literal["hermes", "llama3_json", "mistral"]


class Call(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> str:
        """JSON text."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A call is `head` with its name, its arguments, and `tail`."""

    name: FamilyName
    read: Reader
    markers: tuple[str, ...]  # each may be a special token
    opening: str  # what the first call begins with, and nothing else should
    trigger: str  # a regex of that, as loose as the parser is
    bare_trigger: str | None = None  # the same of a call that an answer may begin with, too
    head: str
    tail: str
    begin: str = ""  # before the first call,
    separator: str = ""  # between two,
    end: str = ""  # and behind the last

    def write(self, calls: Sequence[Call]) -> str:
        """The calls as a model of the family writes them."""
        texts = [self.head_of(call.name) + (call.arguments or "{}") + self.tail for call in calls]
        return self.begin + self.separator.join(texts) + self.end

    def head_of(self, name: str) -> str:
        return self.head.replace("NAME", name)


_OBJECT = r'\{[ \n]*"name"[ \n]*:[ \n]*"'

HERMES = Family(
    name="hermes",
    read=hermes.read,
    markers=(hermes.BEGIN, hermes.END),
    opening=hermes.BEGIN,
    trigger=hermes.BEGIN,
    bare_trigger=r"(```(json)?[ \n]*)?" + _OBJECT,
    head=f'{hermes.BEGIN}\n{{"name": "NAME", "arguments": ',
    tail=f"}}\n{hermes.END}",
    separator="\n",
)
LLAMA3_JSON = Family(
    name="llama3_json",
    read=llama3_json.read,
    markers=(llama3_json.BEGIN,),
    opening='{"name": "',
    trigger=_OBJECT,
    head='{"name": "NAME", "parameters": ',
    tail="}",
    separator="; ",
)
MISTRAL = Family(
    name="mistral",
    read=mistral.read,
    markers=(mistral.BEGIN, mistral.ID, mistral.ARGUMENTS),
    opening=mistral.BEGIN,
    trigger=r"\[TOOL_CALLS\]",
    begin=f"{mistral.BEGIN}[",
    head='{"name": "NAME", "arguments": ',
    tail="}",
    separator=", ",
    end="]",
)
MISTRAL_NAMED = replace(  # from the end of 2024 on
    MISTRAL, begin="", head=f"{mistral.BEGIN}NAME{mistral.ARGUMENTS}", tail="", separator="", end=""
)
FAMILIES: dict[str, Family] = {family.name: family for family in (HERMES, LLAMA3_JSON, MISTRAL)}


# What Llama's templates tell the model to write, or write themselves of past calls.
_LLAMA3_CALL = re.compile(r'\{"name": [^{}]{1,80}"parameters"')


def family_of(template: str) -> Family | None:
    """The family of a chat template that knows tools; the text may be its source or a prompt."""
    if hermes.BEGIN in template:
        return HERMES
    if mistral.BEGIN in template:
        return MISTRAL_NAMED if mistral.ARGUMENTS in template else MISTRAL
    if llama3_json.BEGIN in template or _LLAMA3_CALL.search(template):
        return LLAMA3_JSON
    return None


def new_id() -> str:
    """A call's id, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def new_short_id() -> str:
    """The nine letters and digits that Mistral's templates ask for."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
