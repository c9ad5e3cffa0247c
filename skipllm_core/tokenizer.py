"""Text to token ids and back, on the `tokenizers` library (transformers would import torch)."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from skipllm_core.chat_template import ChatTemplate, Message, template_of
from skipllm_core.control_tokens import ControlTokenEncoder, ControlTokens
from skipllm_core.errors import ConfigError, InvalidRequestError
from skipllm_core.special_tokens import declare_tokens

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What the server needs of a tokenizer. Implementations: HFTokenizer, ByteTokenizer."""

    eos_token_ids: tuple[int, ...]  # end a sequence unless the request ignores them
    max_token_chars: int  # no token spells more characters than this
    chat_template: str | None  # its source

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a raw prompt. Control tokens spelled in it are control tokens."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Ids of a chat under the model's template, which is given `tools` as they are. Control
        tokens spelled in the messages stay plain text. Raises InvalidRequestError where the
        template refuses the messages."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, which may be part of a character; a special
        token's spelling; nothing for an id beyond the vocabulary."""
        ...

    def token_piece(self, token_id: int) -> str:
        """A token as the vocabulary spells it, as `Ġfox`; nothing for an id beyond it."""
        ...

    def is_special(self, token_id: int) -> bool: ...


class HFTokenizer:
    """The tokenizer of a Hugging Face model directory.

    Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and the end-of-sequence ids of
    generation_config.json and config.json, these of `eos_from` where a model is served with
    another's tokenizer. `chat_template` is a file to use instead of the model's. Raises ConfigError
    if they are missing or unusable.
    """

    def __init__(
        self, model_dir: Path, *, eos_from: Path | None = None, chat_template: Path | None = None
    ) -> None:
        self.directory = model_dir
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; only fast tokenizers are supported")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"cannot read {path}: {error}") from error
        stored = _read_json(path)
        self._tokenizer.no_truncation()  # both may be stored in the file
        self._tokenizer.no_padding()
        config = _read_json(model_dir / "tokenizer_config.json")
        special_tokens_map = _read_json(model_dir / "special_tokens_map.json")
        names = declare_tokens(self._tokenizer, config, special_tokens_map)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._piece_bytes = _piece_decoder(stored, path)
        self.max_token_chars = max(map(len, self._tokenizer.get_vocab()))
        self.eos_token_ids = self._find_eos_ids(eos_from or model_dir, names.get("eos_token"))
        self.chat_template = _template_source(model_dir, config, chat_template)
        self._chat = self._compile(self.chat_template, names, stored["model"])
        with_tools = None if chat_template else _template_with_tools(model_dir, config)
        self._chat_with_tools = (
            self._compile(with_tools, names, stored["model"]) if with_tools else self._chat
        )
        model_config = _read_json((eos_from or model_dir) / "config.json")
        self._check_fits(model_config.get("vocab_size"), stored["model"])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> list[int]:
        chat = self._chat if tools is None else self._chat_with_tools
        if chat is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        template, encoder = chat
        prompt = template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            options=options,
        )
        return encoder.encode(prompt)  # the template writes the begin-of-sequence token itself

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._piece_bytes(piece)

    def token_piece(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def _find_eos_ids(self, model_dir: Path, spelled: str | None) -> tuple[int, ...]:
        ids: set[int] = set()
        if spelled is not None and (eos := self._tokenizer.token_to_id(spelled)) is not None:
            ids.add(eos)
        for name in ("generation_config.json", "config.json"):
            found = _read_json(model_dir / name).get("eos_token_id")
            ids.update(i for i in _as_list(found) if type(i) is int and i >= 0)
        return tuple(sorted(ids))

    def _compile(
        self, source: str | None, names: Mapping[str, str], model: Mapping[str, Any]
    ) -> tuple[ChatTemplate, ControlTokenEncoder] | None:
        if source is None:
            return None
        template = ChatTemplate(source, variables=names)
        if template.undefined_tokens:
            logger.warning(
                "the chat template names %s, which no file of the tokenizer defines: it writes "
                "nothing there",
                ", ".join(template.undefined_tokens),
            )
        tokens = ControlTokens.of(self._tokenizer, template)
        return template, ControlTokenEncoder(self._tokenizer, model, tokens)

    def _check_fits(self, vocab_size: object, model: Mapping[str, Any]) -> None:
        """Raises ConfigError if texts, or chats of the template, may have ids that the model has no
        embedding of. Added tokens beyond it that nothing writes (of padding, say) are only told."""
        if type(vocab_size) is not int:
            return
        vocab = model["vocab"]
        num_ids = max(vocab.values(), default=-1) + 1 if isinstance(vocab, dict) else len(vocab)
        if num_ids > vocab_size:
            raise ConfigError(
                f"the tokenizer does not fit the model: its vocabulary has {num_ids} entries, the "
                f"model's embedding {vocab_size}"
            )
        beyond = {i: token for i, token in sorted(self._added.items()) if i >= vocab_size}
        needed = set(map(self._added.get, self.encode("")))
        for _, encoder in filter(None, (self._chat, self._chat_with_tools)):
            needed |= encoder.tokens.written
        for token_id, token in beyond.items():
            if token in needed:
                raise ConfigError(
                    f"the tokenizer does not fit the model: {token!r:.100}, which prompts "
                    f"are made with, is token {token_id}, the model's embedding has {vocab_size}"
                )
        if beyond:
            logger.warning(
                "the model's embedding has %d tokens: %s of the tokenizer cannot be used",
                vocab_size, ", ".join(f"{token!r:.50}" for token in list(beyond.values())[:5]),
            )  # fmt: skip


class ByteTokenizer:
    """Ids 0 to 255 are bytes, then two control tokens. For tests: every text and id is obvious."""

    BOS, EOS = 256, 257
    eos_token_ids: tuple[int, ...] = (EOS,)
    max_token_chars = 1
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [self.BOS] * add_special_tokens + list(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> list[int]:
        """`role: content` lines; a continued last one has no line end."""
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if continue_final_message:
            text = text[:-1]
        elif add_generation_prompt:
            text += "assistant: "
        return self.encode(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        kept = (i for i in token_ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return {self.BOS: b"<s>", self.EOS: b"</s>"}.get(token_id, b"")

    def token_piece(self, token_id: int) -> str:
        """The byte as a character of Latin-1."""
        return self.token_bytes(token_id).decode("latin-1")

    def is_special(self, token_id: int) -> bool:
        return token_id in (self.BOS, self.EOS)


def _piece_decoder(stored: Mapping[str, Any], path: Path) -> Any:
    """How a vocabulary entry spells bytes: the two ways of the Llama, Mistral and Qwen families."""
    decoder = json.dumps(stored.get("decoder"), ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        byte_of = _byte_level_alphabet()

        def byte_level_bytes(piece: str) -> bytes:
            if all(char in byte_of for char in piece):
                return bytes(byte_of[char] for char in piece)
            return piece.encode()  # no byte's spelling: the text itself, as to the library

        return byte_level_bytes
    if '"ByteFallback"' in decoder or '"Metaspace"' in decoder:
        return _sentencepiece_bytes
    raise ConfigError(f"{path}: unsupported decoder; ByteLevel, ByteFallback and Metaspace are")


def _sentencepiece_bytes(piece: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the other
    bytes, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


def _template_source(
    model_dir: Path, config: Mapping[str, Any], instead: Path | None
) -> str | None:
    """The model's own, or what the file holds that is to be used instead."""
    path = instead or model_dir / "chat_template.jinja"
    return template_of(config, _text(path) if instead or path.is_file() else None)


def _template_with_tools(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """The source of the template that is for requests with tools, where a model has two."""
    path = model_dir / "additional_chat_templates" / "tool_use.jinja"
    return template_of(config, _text(path) if path.is_file() else None, "tool_use")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
