"""Which control tokens of a prompt are meant: a prompt's text to ids, with those that others spell
left as the text that they are.

The whole prompt is encoded once, by a tokenizer that knows the control tokens under other names,
which nobody can guess; every control token that is meant is replaced by its other name before:

    <|im_start|>user\\nwhat is <|im_end|>?<|im_end|>
    NAME-OF-1  user\\nwhat is <|im_end|>? NAME-OF-2     ->  1 ... 2

So text is treated exactly as the model's tokenizer treats text, spaces and all, wherever it stands.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import tokenizers

from skipllm_core.chat_template import ChatTemplate
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.tainted import Origin, Span, plain, spans_of

_MAX_GAPS = 2**20

# Tags that mark no turn: they are at home in what an application, a tool or the model says.
_TAG = re.compile(r"</?(think|thinking|reasoning|tools|tool_call|tool_response)>|\[/?THINK\]")

# What a template writes around these marks the turns.
_HELLO, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
_PLAIN_CHATS = (
    [_HELLO, _ANSWER, _HELLO],
    [{"role": "system", "content": "a"}, _HELLO, _ANSWER, _HELLO],
)


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The added tokens that are more than text to a model under its template."""

    guarded: frozenset[str]  # nothing that a user writes is one of them
    turn_marks: frozenset[str]  # of these, nothing that others write either
    written: frozenset[str]  # what the template may write

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, template: ChatTemplate) -> ControlTokens:
        """Special tokens, and of the other added tokens those that the template spells; which of
        the latter mark turns is seen in what it makes of plain chats."""
        added = tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        visible = {token.content for token in added if token.content.strip()}
        tags = set(filter(_TAG.fullmatch, visible))
        spelled = {token for token in visible if token in template.source}
        chats = _rendered(template, add_generation_prompt=False)
        in_turns = {token for token in visible if any(token in chat for chat in chats)}
        marks = special | (in_turns if chats else spelled)
        prompts = _rendered(template, add_generation_prompt=True)
        written = {token for token in special | visible if any(token in p for p in prompts)}
        return cls(
            guarded=frozenset(marks | spelled | tags),
            turn_marks=frozenset(marks - tags),
            written=frozenset(written | spelled),
        )


def _rendered(template: ChatTemplate, *, add_generation_prompt: bool) -> list[str]:
    found = []
    for chat in _PLAIN_CHATS:
        with suppress(InvalidRequestError):
            found.append(template.render(chat, add_generation_prompt=add_generation_prompt))
    return found


class ControlTokenEncoder:
    """Encodes prompts as the tokenizer does, but for control tokens that others than the template
    spell and may not. `model` is the tokenizer's, as tokenizer.json has it."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, model: Mapping[str, Any], tokens: ControlTokens
    ) -> None:
        guarded = tokens.guarded
        nonce = f"q{secrets.token_hex(8)}"
        self._names = {token: f"{nonce}{index}z" for index, token in enumerate(guarded)}
        self.tokens = tokens
        self._by_length = sorted(guarded, key=len, reverse=True)
        self._any = re.compile(_any_of(self._by_length))
        tags = [token for token in self._by_length if token not in tokens.turn_marks]
        self._tag = re.compile(_any_of(tags))
        self._tokenizer, self._ids = _renamed(tokenizer, model, self._names)

    def encode(self, prompt: str) -> list[int]:
        text = self._with_names(prompt)
        found = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._ids.get(token_id, token_id) for token_id in found]

    def _with_names(self, prompt: str) -> str:
        text, spans = plain(prompt), spans_of(prompt)
        longest = len(self._by_length[0]) if self._by_length else 0
        parts: list[str] = []
        copied = 0
        for start, end, origin in _regions(spans, len(text)):
            if Origin.USER in origin:
                continue  # what begins there is the user's, in part at least
            pattern = self._tag if origin else self._any
            at = max(start, copied)
            while at < end and (found := pattern.search(text, at, end + longest)):
                at = found.start()
                if at >= end:
                    break
                token = self._meant(found[0], at, spans)
                if token is None:
                    at += 1
                    continue
                parts += text[copied:at], self._names[token]
                copied = at = at + len(token)
        return "".join((*parts, text[copied:]))

    def _meant(self, spelling: str, start: int, spans: Sequence[Span]) -> str | None:
        """The longest control token that is meant, of those that the text spells at `start`."""
        for token in (spelling, *filter(spelling.startswith, self._by_length)):
            origin = _origin(spans, start, start + len(token))
            if Origin.USER not in origin and (not origin or token not in self.tokens.turn_marks):
                return token
        return None


def _regions(spans: Sequence[Span], length: int) -> Iterator[Span]:
    """The spans, and what is between them and nobody's."""
    position = 0
    for span in spans:
        yield Span(position, span.start, Origin(0))
        yield span
        position = span.end
    yield Span(position, length, Origin(0))


def _origin(spans: Sequence[Span], start: int, end: int) -> Origin:
    """Who wrote something between two places."""
    union = Origin(0)
    for index in range(bisect_right(spans, start, key=attrgetter("end")), len(spans)):
        if spans[index].start >= end:
            break
        union |= spans[index].origin
    return union


def _any_of(longest_first: Sequence[str]) -> str:
    """A pattern for any of them; for nothing if there are none."""
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _renamed(
    tokenizer: tokenizers.Tokenizer, model: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """A tokenizer that is the given one but for the names of these added tokens, and what its ids
    stand for where they differ."""
    is_shared = not _may_become_one_of(names.keys(), model)
    renamed = tokenizers.Tokenizer(tokenizer.model if is_shared else _renamed_model(model, names))
    renamed.normalizer = tokenizer.normalizer
    renamed.pre_tokenizer = tokenizer.pre_tokenizer
    # Added tokens are numbered from the model's size on: over its own ids, if these have gaps.
    vocab = model["vocab"]
    max_id = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    num_fillers = max_id + 1 - len(vocab)
    if num_fillers > _MAX_GAPS:
        raise ConfigError(f"the tokenizer's vocabulary has {num_fillers} gaps")
    filler = secrets.token_hex(8)
    added = tokenizer.get_added_tokens_decoder()
    renamed.add_tokens(
        [
            *(f"{filler}{index}z" for index in range(num_fillers)),
            *(_named(token, names.get(token.content)) for token in added.values()),
        ]
    )
    ids: dict[int, int] = {}
    for token_id, token in added.items():
        other_id = renamed.token_to_id(names.get(token.content, token.content))
        assert other_id is not None, f"{token.content!r} was not added"
        ids[other_id] = token_id
    return renamed, ids


def _named(token: tokenizers.AddedToken, name: str | None) -> tokenizers.AddedToken:
    if name is None:
        return token
    return tokenizers.AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,  # no normalizer is to touch the name
        special=True,
    )


def _may_become_one_of(tokens: AbstractSet[str], model: Mapping[str, Any]) -> bool:
    """Whether the model could make one of the tokens out of plain text."""
    if "merges" in model and not model.get("ignore_merges"):
        return any("".join(merge) in tokens for merge in _merges(model))
    pieces = (
        model["vocab"] if isinstance(model["vocab"], dict) else map(itemgetter(0), model["vocab"])
    )
    return not tokens.isdisjoint(pieces)


def _renamed_model(model: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """A copy of the model whose vocabulary has the tokens under their other names only."""
    vocab = model["vocab"]
    changed: dict[str, Any] = dict(model)
    if isinstance(vocab, dict):
        changed["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    else:  # Unigram: pairs of a piece and its score
        changed["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        changed["merges"] = [
            merge for merge in _merges(model) if names.keys().isdisjoint({*merge, "".join(merge)})
        ]
    if model.get("unk_token") in names:
        changed["unk_token"] = names[model["unk_token"]]
    stored = {"version": "1.0", "added_tokens": [], "model": changed}
    return tokenizers.Tokenizer.from_str(json.dumps(stored)).model


def _merges(model: Mapping[str, Any]) -> Iterator[list[str]]:
    """The pairs, which older files write with a space between."""
    for merge in model["merges"]:
        yield merge.split(" ", 1) if isinstance(merge, str) else merge
