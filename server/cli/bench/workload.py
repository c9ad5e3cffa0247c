"""The bodies of the requests that a benchmark sends: drawn from a seed, or read from a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from server.cli.prompts import read_prompt_lines
from server.settings import SettingsError

CHAT = "/v1/chat/completions"

Prompt = dict[str, Any]  # the field of a request's body that bears it

# Short and frequent: about one token each in any English vocabulary.
_TEXT = (
    "the of and to in is that it for as was with be by on not he his but at are this have from or "
    "had an they which one you were her all she there would their we him been has when who will "
    "more no if out so said what up its about into than them can only other new some could time "
    "these two may then do first any my now such like our over man me even most made after also "
    "did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still own see men work long get "
    "here between both life being under never day same another know while last might us great old "
    "year off come since against go came right used take three"
)
_WORDS = _TEXT.split()
SAMPLE = " ".join(_WORDS[:25])  # a text that fits any context


def random_prompts(
    num_prompts: int, num_tokens: int, seed: int, *, is_chat: bool, token_ids: Sequence[int] | None
) -> list[Prompt]:
    """Prompts of `num_tokens` of the `token_ids`; without ids, and in chats, of as many words."""
    rng = random.Random(seed)  # noqa: S311  # a benchmark's, to be drawn again
    if token_ids and not is_chat:
        return [{"prompt": rng.choices(token_ids, k=num_tokens)} for _ in range(num_prompts)]
    texts = [" ".join(rng.choices(_WORDS, k=num_tokens)) for _ in range(num_prompts)]
    return [_as_chat(text) if is_chat else {"prompt": text} for text in texts]


def prompts_of_file(path: Path, num_prompts: int, *, is_chat: bool) -> list[Prompt]:
    """The prompts of a JSON Lines file, again and again until there are `num_prompts`. Raises
    SettingsError."""
    prompts: list[Prompt] = []
    for number, line in read_prompt_lines(path):
        if is_chat:
            messages = line.messages
            prompts.append({"messages": messages} if messages else _as_chat(line.prompt or ""))
        elif line.prompt is not None:
            prompts.append({"prompt": line.prompt})
        else:
            raise SettingsError(f"{path}, line {number}: messages need --endpoint {CHAT}")
    if not prompts:
        raise SettingsError(f"{path} has no prompts")
    return list(islice(cycle(prompts), num_prompts))


def _as_chat(content: str) -> Prompt:
    return {"messages": [{"role": "user", "content": content}]}
