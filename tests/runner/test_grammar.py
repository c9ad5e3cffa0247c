"""Masks on real logits: every kind of sampling keeps to them, and no neighbour notices."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch

from skipllm_core.config import EngineConfig
from skipllm_core.demo import MODEL_DIR
from skipllm_core.engine.engine import Engine
from skipllm_core.engine.runner import RowResult
from skipllm_core.grammar.state import GrammarState
from skipllm_core.runner.gpu_runner import GpuModelRunner
from skipllm_core.runner.graphs import direct
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.runner.sampler import sample
from skipllm_core.sequence import Sequence
from skipllm_core.tokenizer import HFTokenizer
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams
from tests.grammar.texts import EOS, PERSON, VOCAB, allowed, compact, compiled, feed, state_of
from tests.runner.reference_decoder import ReferenceDecoder
from tests.runner.test_isolation import VICTIM
from tests.runner.tiny import (
    BLOCK_BYTES,
    NUM_LAYERS,
    TinyTokenizer,
    engine_config,
    generate,
    skipped,
    text,
    tiny_engine,
    write_config,
)

LETTERS = "start: /[a-z]+/"
IS_LETTER = set(range(ord("a"), ord("z") + 1))


def seq_under(grammar: str, **params: Any) -> Sequence:
    settings = {"max_tokens": 64, "stop_token_ids": (EOS,)} | params
    seq = Sequence(0, [1, 2, 3], SamplingParams(grammar=grammar, **settings))
    seq.grammar = GrammarState(compiled(grammar), seq.params)
    return seq


def logits_of(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 4


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.0, "min_p": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 2.0},
        {"temperature": 1.0, "logit_bias": ((5, 100.0), (ord("a"), -100.0))},
    ],
    ids=str,
)
def test_every_kind_of_sampling_keeps_to_the_mask(params: dict[str, Any]) -> None:
    seqs = [seq_under(LETTERS, seed=seed, **params) for seed in range(40)]
    for result in sample(logits_of(40), seqs):
        assert result.token_id in IS_LETTER


def test_the_best_allowed_token_is_taken_and_its_logprob_is_the_models_own() -> None:
    logits = logits_of(1)
    (result,) = sample(logits, [seq_under(LETTERS, temperature=0.0, logprobs=2)])
    letters = sorted(IS_LETTER)
    assert result.token_id == letters[int(logits[0, letters].argmax())]
    assert result.logprobs is not None
    assert result.token_id is not None
    expected = logits[0].log_softmax(-1)
    assert result.logprobs.logprob == pytest.approx(float(expected[result.token_id]), abs=1e-5)
    assert result.logprobs.top_ids == tuple(expected.topk(2).indices.tolist())


def test_a_neighbour_under_a_grammar_changes_no_draw() -> None:
    logits = logits_of(3)
    plain = Sequence(0, [1], SamplingParams(max_tokens=9, seed=8))
    alone = sample(logits[1:2], [plain])[0].token_id
    hostile = [seq_under(LETTERS), plain, seq_under('start: "x"')]
    assert sample(logits, hostile)[1].token_id == alone


def test_a_biased_away_text_still_follows_its_grammar() -> None:
    biases = tuple((i, -100.0) for i in IS_LETTER)
    (result,) = sample(logits_of(1), [seq_under(LETTERS, temperature=0.0, logit_bias=biases)])
    assert result.token_id in IS_LETTER


def test_a_dead_end_ends_its_row_alone() -> None:
    dead = seq_under("start: /a{3}/", stop_token_ids=(ord("a"),), min_tokens=2)
    results = sample(logits_of(2), [dead, seq_under(LETTERS)])
    assert results[0] == RowResult(None, error="no token is allowed here", is_request_fault=True)
    assert results[1].token_id in IS_LETTER


def test_a_late_mask_is_told_and_not_waited_for() -> None:
    late = seq_under(LETTERS)
    assert late.grammar is not None
    late.grammar.accept(ord("a"))  # and nobody fills the mask
    results = sample(logits_of(2), [late, seq_under(LETTERS)])
    assert results[0].is_late
    assert results[1].token_id in IS_LETTER


def test_min_tokens_bars_no_end_of_a_complete_text() -> None:
    seq = seq_under(LETTERS + r' "!" ""', min_tokens=9)
    assert seq.grammar is not None
    feed(seq.grammar, b"a")
    assert EOS not in allowed(seq.grammar.mask())
    assert state_of('start: ""', min_tokens=9).ends_with(EOS)


# A tiny model -------------------------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SKIP = SkipParams(policy="ffn_skip", threshold=-1.0, warmup_tokens=3, cold_start=1, cold_end=5)


def requests(num_requests: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(0)
    return [
        (
            [rng.randrange(3, 96) for _ in range(rng.randint(1, 30))],
            SamplingParams(
                max_tokens=60,
                temperature=0.0,
                repetition_penalty=rng.choice([1.0, 1.3]),
                logprobs=rng.choice([None, 2]),
                stop_token_ids=(2,),
                skip=replace(SKIP if index % 2 else SkipParams(), trace=True),
                grammar=compact(SCHEMA) if index % 3 else None,
            ),
        )
        for index in range(num_requests)
    ]


def serve(engine: Engine, wanted: list[tuple[list[int], SamplingParams]]) -> list[list[SeqOutput]]:
    for seq_id, (prompt_ids, params) in enumerate(wanted):
        engine.add(seq_id, prompt_ids, params)
    outputs: list[list[SeqOutput]] = [[] for _ in wanted]
    while engine.has_work:
        step = engine.step()
        for output in step.outputs if step is not None else ():
            outputs[output.seq_id].append(output)
    return outputs


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return engine_config(
        write_config(tmp_path),
        max_num_seqs=6,
        max_model_len=100,
        kv_cache_memory_bytes=100 * BLOCK_BYTES,
    )


def tiny_text(outputs: list[SeqOutput]) -> str:
    return b"".join(TinyTokenizer().token_bytes(i) for i in text(outputs) if i != 2).decode()


def test_texts_on_the_device_equal_the_eager_runners(config: EngineConfig) -> None:
    config = replace(config, enforce_eager=True)
    runner = GpuModelRunner(config, ReferenceDecoder, lambda: direct)
    found = serve(tiny_engine(runner, config), requests(16))
    expected = serve(tiny_engine(TorchModelRunner(config), config), requests(16))
    for index, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert text(left) == text(right), index
        assert skipped(left) == skipped(right)
        assert left[-1].finish_reason == right[-1].finish_reason
        for mine, theirs in zip(left, right, strict=True):
            assert [p.top_ids for p in mine.logprobs] == [p.top_ids for p in theirs.logprobs]
        if left[-1].finish_reason == "stop" and requests(16)[index][1].grammar:
            jsonschema_rs.validate(SCHEMA, json.loads(tiny_text(left)))


def test_skipping_and_preemption_leave_a_text_as_it_is(config: EngineConfig) -> None:
    plenty = serve(tiny_engine(TorchModelRunner(config), config), requests(12))
    scarce = replace(config, kv_cache_memory_bytes=9 * BLOCK_BYTES)
    runner = TorchModelRunner(scarce)
    found = serve(tiny_engine(runner, scarce), requests(12))
    assert sum(outputs[-1].num_preemptions for outputs in found) > 0
    assert [text(outputs) for outputs in found] == [text(outputs) for outputs in plenty]
    assert any(layers for outputs in found for layers in skipped(outputs))


def test_neighbours_under_grammars_leave_a_request_alone(config: EngineConfig) -> None:
    runner = TorchModelRunner(config)
    alone = generate(runner, config, [VICTIM])[0]
    beside = serve(tiny_engine(runner, config), [VICTIM, *requests(10)])[0]
    assert text(beside) == text(alone)
    assert skipped(beside) == skipped(alone)
    assert NUM_LAYERS > len(set(skipped(alone))) > 1


# The embedded model -------------------------------------------------------------------------------


def test_the_embedded_model_writes_what_a_schema_asks_for() -> None:
    hf_tokenizer = HFTokenizer(MODEL_DIR)
    config = EngineConfig(
        model_dir=MODEL_DIR, device="cpu", max_num_seqs=8, kv_cache_memory_bytes=2**26
    )
    runner = TorchModelRunner(config)
    prompt_ids = hf_tokenizer.encode_chat([{"role": "user", "content": "Tell me about Anna."}])
    params = SamplingParams(
        max_tokens=200,
        stop_token_ids=hf_tokenizer.eos_token_ids,
        grammar=compact(PERSON),
        skip=SKIP,
    )
    wanted = [(prompt_ids, replace(params, seed=seed, temperature=0.5 * seed)) for seed in range(4)]
    for outputs in serve(Engine(runner, config, runner.max_model_len), wanted):
        assert outputs[-1].finish_reason == "stop", outputs[-1]
        jsonschema_rs.validate(PERSON, json.loads(hf_tokenizer.decode(text(outputs))))
