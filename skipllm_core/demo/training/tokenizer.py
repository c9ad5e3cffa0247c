"""The demo model's tokenizer: byte-level BPE on our own data, digits one by one, and chat roles."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from skipllm_core.demo.data.dialogues import DialogueMaker, Message
from skipllm_core.demo.data.words import BOYS, GIRLS

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLE_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
VOCAB_SIZE = 2048

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] in ['system', 'developer'] -%}
        {{- '<|system|>' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '<|user|>' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
    {%- else -%}
        {{- raise_exception('Unknown role: ' + message['role']) -}}
    {%- endif -%}
    {{- message['content'] | trim + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train_tokenizer(num_conversations: int = 40_000, seed: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the mixture; every string survives a round trip."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, END, PAD, *ROLE_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(num_conversations, seed), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _texts(num_conversations: int, seed: int) -> Iterator[str]:
    for conversation in itertools.islice(DialogueMaker(seed).conversations(), num_conversations):
        for message in conversation:
            yield message["content"]
    # Names are copied from story to summary: one token each makes that one step.
    for _ in range(200):
        yield "".join(f" {name}" for name in GIRLS + BOYS)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


class Renderer:
    """Turns conversations into ids exactly as the chat template does, and says who speaks."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._bpe = tokenizer.backend_tokenizer
        vocab: dict[str, int] = self._bpe.get_vocab()
        self._bos, self._end = vocab[BOS], vocab[END]
        self._roles = {role: vocab[token] for role, token in ROLE_TOKENS.items()}

    def render(self, messages: Sequence[Message]) -> tuple[list[int], list[float]]:
        """(ids, loss weight of each id): 0 for all but the assistant's words and their end.

        A reply of n ids weighs about sqrt(n) in all, or a few stories would drown the facts.
        """
        ids, weights = [self._bos], [0.0]
        for message in messages:
            content = [*self._bpe.encode(message["content"]).ids, self._end]
            ids += [self._roles[message["role"]], *content]
            is_reply = message["role"] == "assistant"
            weight = min(1.0, (8 / len(content)) ** 0.5) if is_reply else 0.0
            weights += [0.0, *[weight] * len(content)]
        return ids, weights
