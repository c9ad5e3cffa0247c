"""llguidance's view of our tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from llguidance import LLTokenizer

from skipllm_core.tokenizer import Tokenizer

# Of the bytes that a grammar forces, whose split is asked for at every token: more would make a
# long literal's time grow with the square of its length. The first token is all that is used.
MAX_FORCED_CHARS = 256


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids are those of the logits: where these are wider than the tokenizer, the ids beyond
    spell nothing, and no grammar allows them."""

    tokenizer: LLTokenizer
    eos_token_ids: tuple[int, ...]
    ends: tuple[int, ...]  # the ids that llguidance allows where a text may end
    vocab_size: int  # of the logits

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
        eos_ids = tuple(i for i in tokenizer.eos_token_ids if i < vocab_size)
        # llguidance wants an id to end with: where the model has none, one beyond the logits.
        ends = eos_ids or (vocab_size,)
        source = _Source(tokenizer, vocab_size, ends[0])
        source.built = LLTokenizer(source, eos_token=list(ends))  # type: ignore[arg-type]
        return cls(source.built, eos_ids, ends, vocab_size)


class _Source:
    """A tokenizer in the form that llguidance reads (its `TokenizerWrapper`)."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    built: LLTokenizer

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        ids = range(vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in ids] + [b""]
        self.special_token_ids = [i for i in ids if tokenizer.is_special(i)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """How the tokenizer would split forced text. A special token that is spelled there is text
        like any other; where the tokenizer has its own idea of the text (a space in front), the
        longest tokens that fit will do."""
        text = text[:MAX_FORCED_CHARS]
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        is_text = not any(map(self._tokenizer.is_special, ids))
        if is_text and b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return self.built.greedy_tokenize(text)
