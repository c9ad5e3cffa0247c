"""The tokenizer of a GGUF file, in the form that the `tokenizers` library and transformers read.

What splits a text into words before its bytes are merged is told by one of llama.cpp's names only
(`tokenizer.ggml.pre`); the rules are those of the models that the names stand for.
"""

from __future__ import annotations

from typing import Any

from skipllm_core.model.gguf.header import Header

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2  # types of tokens

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GPT2 = [{**_BYTES, "use_regex": True}]  # whose rule ByteLevel has built in
_SINGLE_DIGITS = [{"type": "Digits", "individual_digits": True}, *_GPT2]


def _split(pattern: str) -> list[dict[str, Any]]:
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [rule, {**_BYTES, "use_regex": False}]


_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # that are tokens are not merged first
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "smaug-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
    "deepseek-r1-qwen": _split(_QWEN2),
    "megrez": _split(_QWEN2),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "tekken": _split(_TEKKEN),
}
_MAX_MERGE_WORK = 2**26  # characters, to find the merges of a vocabulary that comes without


def tokenizer_json(header: Header) -> dict[str, Any]:
    """tokenizer.json. Raises UnsupportedModelError for a tokenizer that is not one of ours."""
    keys = _Keys(header)
    model = header.values.get("tokenizer.ggml.model")
    if model == "gpt2":
        parts = _byte_level(keys)
    elif model == "llama":
        parts = _sentencepiece(keys)
    else:
        raise header.refused(
            f"tokenizer.ggml.model is {model!r:.60}; supported: 'gpt2' (byte-level BPE) and "
            "'llama' (sentencepiece)"
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": keys.added_tokens(),
        "post_processor": _post_processor(keys),
        **parts,
    }


def tokenizer_config(header: Header) -> dict[str, Any]:
    """tokenizer_config.json: the tokens that have names, for chat templates to write."""
    keys = _Keys(header)
    return {f"{name}_token": keys.named[name] for name in ("bos", "eos", "unk", "pad")}


def chat_templates(header: Header) -> dict[str, str]:
    """The sources of the templates by their names; `default` is the one for chats without tools."""
    found = {}
    for name, key in (("default", ""), ("default", ".default"), ("tool_use", ".tool_use")):
        source = header.values.get(f"tokenizer.chat_template{key}")
        if isinstance(source, str) and name not in found:
            found[name] = source
    return found


class _Keys:
    """What the file says of its tokenizer, checked."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.tokens: list[str] = self.array("tokens", str)
        if len(set(self.tokens)) != len(self.tokens):
            raise header.refused("tokenizer.ggml.tokens: a token appears twice")
        self.types: list[int] = self.array("token_type", int, of_tokens=True, default=[])
        ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        self.ids = {name: self._token_id(f"{key}_token_id") for name, key in ids.items()}
        self.named = {name: None if i is None else self.tokens[i] for name, i in self.ids.items()}

    def get(self, name: str, default: Any = None) -> Any:
        return self.header.values.get(f"tokenizer.ggml.{name}", default)

    def array(self, name: str, of: type, *, of_tokens: bool = False, default: Any = None) -> Any:
        """A list; one for each token, if `of_tokens`."""
        found = self.get(name, default)
        if not isinstance(found, list) or not all(type(item) is of for item in found):
            raise self.header.refused(f"tokenizer.ggml.{name} is missing, or no list")
        if of_tokens and found and len(found) != len(self.tokens):
            raise self.header.refused(f"tokenizer.ggml.{name} is not one for each token")
        return found

    def flag(self, name: str, default: bool) -> bool:
        found = self.get(name, default)
        if not isinstance(found, bool):
            raise self.header.refused(f"tokenizer.ggml.{name} is {found!r:.40}, no true or false")
        return found

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that texts are searched for before anything else: special ones, and the user's."""
        special = {i for i, kind in enumerate(self.types) if kind in (_CONTROL, _UNKNOWN)}
        special |= {i for i in self.ids.values() if i is not None}
        users = {i for i, kind in enumerate(self.types) if kind == _USER_DEFINED}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": i, "content": self.tokens[i], **flags, "special": i in special}
            for i in sorted(special | users)
            if self.tokens[i]
        ]

    def _token_id(self, name: str) -> int | None:
        found = self.get(name)
        if found is None or found in (-1, 2**32 - 1):  # none, as some write it
            return None
        if type(found) is not int or not 0 <= found < len(self.tokens):
            raise self.header.refused(f"tokenizer.ggml.{name} is {found!r:.40}, which is no token")
        return found


def _byte_level(keys: _Keys) -> dict[str, Any]:
    name = keys.get("pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise keys.header.refused(
            f"tokenizer.ggml.pre is {name!r:.60}; supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    merges = [merge.split(" ") for merge in keys.array("merges", str)]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[name]},
        "decoder": {**_BYTES, "add_prefix_space": True, "use_regex": True},
        "model": {
            **_bpe(keys, merges),
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "ignore_merges": name in _WHOLE_WORDS,
        },
    }


def _sentencepiece(keys: _Keys) -> dict[str, Any]:
    has_space = keys.flag("add_space_prefix", True)
    if keys.get("merges") is None:
        merges = _merges_by_score(keys)
    else:
        merges = [merge.split(" ") for merge in keys.array("merges", str)]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_space:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first" if has_space else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **_bpe(keys, merges),
            "unk_token": keys.named["unk"],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _bpe(keys: _Keys, merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(keys.tokens)},
        "merges": merges,
    }


def _merges_by_score(keys: _Keys) -> list[list[str]]:
    """Sentencepiece joins, of all neighbours that make a piece, those first whose piece scores
    highest: every way to cut a piece into two is a merge, in the order of the scores."""
    scores = keys.array("scores", float, of_tokens=True)
    ids = {token: i for i, token in enumerate(keys.tokens)}
    if sum(len(token) ** 2 for token in keys.tokens) > _MAX_MERGE_WORK:
        raise keys.header.refused("tokenizer.ggml.tokens: its pieces are unreasonably long")
    found = []
    for token, score in zip(keys.tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, -len(left), -len(right), ids[token], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _post_processor(keys: _Keys) -> dict[str, Any]:
    """What is written around a raw prompt. Where the file does not say it: the begin of a sequence,
    for the kinds whose models were trained so."""
    has_bos = keys.get("model") == "llama" or keys.get("pre") in _WHOLE_WORDS
    wanted = {
        "bos": keys.flag("add_bos_token", has_bos),
        "eos": keys.flag("add_eos_token", False),
    }
    names = {name: keys.named[name] for name, is_wanted in wanted.items() if is_wanted}
    special = {
        token: {"id": token, "ids": [keys.ids[name]], "tokens": [token]}
        for name, token in names.items()
        if token is not None
    }

    def around(parts: list[tuple[str, int]]) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = []
        for part, number in parts:
            for piece in ("bos", part, "eos"):
                if piece == part:
                    pieces.append({"Sequence": {"id": part, "type_id": number}})
                elif names.get(piece) is not None:
                    pieces.append({"SpecialToken": {"id": names[piece], "type_id": number}})
        return pieces

    return {
        "type": "TemplateProcessing",
        "single": around([("A", 0)]),
        "pair": around([("A", 0), ("B", 1)]),
        "special_tokens": special,
    }
