"""A checkpoint whose answers are known: a decoder that looks at its last token only.

The embedded model cannot call a tool by itself, and under a grammar its strings run on to the end
of the context. Clients' own test suites want a model that can do both. This one is a table, written
into a real checkpoint (embedding and head; attention and FFN are zero), so that everything between
a client and the logits is what users run: template, grammar, sampler, parser, streaming.

What its template puts last decides how it begins: with tools it calls `get_weather`, after a tool's
result it reports, and else it greets. Under a grammar it writes the shortest JSON it can: 3 for a
number, WORD for a string.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END, GREET, CALL, REPORT = "<|end|>", "<|greet|>", "<|call|>", "<|report|>"
GREETING = ("Hello", " from", " the", " script", ".")
WEATHER = ("<tool_call>\n", '{"name": "get_weather", "arguments": ', '{"location": "', "San ")
WEATHER += ("Francisco", '"}', "}\n</tool_call>")
RESULT = ("It", " is", " sunny", " there", ".")
WORD = "你好, こんにちは"
JOKE = '{"setup": "Why?", "punchline": "Because."}'  # where it may not greet, but write any JSON

GREETING_TEXT, RESULT_TEXT = "".join(GREETING), "".join(RESULT)
ARGUMENTS = {"location": "San Francisco"}

# What may follow a token, best first. Tokens that are not in it are followed as "" says.
FOLLOWS: dict[str, tuple[str, ...]] = {
    '"': (WORD, "}", ",", "]", ":"),
    WORD: ('"', WORD),
    "{": ("}", '"'),
    **dict.fromkeys("0123456789", ("}", ",", "]", "3")),
    "": ('"', "3", "}", "]", "{"),
}
SCRIPTS = ((GREET, *GREETING, END), (CALL, *WEATHER, END), (REPORT, *RESULT, END))

TEMPLATE = """\
{%- for tool in tools or [] %}<|tool|>{{ tool | tojson }}{% endfor %}
{%- for message in messages %}<|role|>{{ message.role }}:
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}
{%- if messages[-1].role == 'tool' %}<|report|>
{%- elif tools %}<|call|>{% else %}<|greet|>{% endif %}
{%- endif %}"""


def save_scripted_model(directory: Path) -> Path:
    """A directory that `skipllm serve` takes: weights, tokenizer, template."""
    tokenizer = _tokenizer()
    vocab = tokenizer.get_vocab()
    table = _table(vocab)
    states = max(64, -(-len(table) // 16) * 16)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=states,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=vocab[END],
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        state_of = {piece: state for state, piece in enumerate(table)}
        for piece, token_id in vocab.items():
            model.model.embed_tokens.weight[token_id, state_of.get(piece, state_of[""])] = 1.0
        for piece, state in state_of.items():
            for rank, follower in enumerate(table[piece]):
                model.lm_head.weight[vocab[follower], state] = 40.0 - rank
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def _table(vocab: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Every token's followers: the next one of its script first, the end of the turn before the
    rest of FOLLOWS, so that a finished grammar is not gone on with."""
    table = {piece: (END, *followers) for piece, followers in FOLLOWS.items()}
    for script in SCRIPTS:
        for piece, follower in pairwise(script):
            table[piece] = (follower, *table[""])
    table[GREET] = (GREETING[0], JOKE, *table[""])
    assert all(piece in vocab for followers in table.values() for piece in followers)
    return table


def _tokenizer() -> Tokenizer:
    """Bytes, and each piece of the script as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, GREET, CALL, REPORT, "<|tool|>", "<|role|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    pieces = dict.fromkeys((*GREETING, *WEATHER, *RESULT, WORD, JOKE))
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in pieces if p not in known])
    return tokenizer
