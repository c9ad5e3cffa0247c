"""A request's neighbours, however hostile, change neither its tokens nor what it skips."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from skipllm_core.engine.engine import Engine
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams
from tests.runner.tiny import (
    BLOCK_BYTES,
    NUM_LAYERS,
    VOCAB,
    engine_config,
    generate,
    skipped,
    text,
    tiny_engine,
    write_config,
)

NUM_BATCHES = 50
GRAMMARS = ("start: /[a-m]+/", 'start: "abab" | "abc"', "start: nothing", "start: /(a+)+b{3}/")
VICTIM = (
    [(7 * i * i + 3 * i + 5) % VOCAB for i in range(40)],
    SamplingParams(
        max_tokens=24,
        temperature=0,
        skip=SkipParams(
            policy="ffn_skip",
            threshold=0.86,  # which its tokens reach at different layers
            warmup_tokens=3,
            cold_start=1,
            cold_end=NUM_LAYERS - 1,
            trace=True,
        ),
    ),
)


def hostile_neighbour(rng: random.Random) -> tuple[list[int], SamplingParams]:
    prompt_ids = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 16, 40]))]
    if rng.random() < 0.5:  # the victim's prompt, or its beginning, and then its own
        prompt_ids = (VICTIM[0][: rng.choice([16, 31, 32, 40])] + prompt_ids)[:48]
    skip = SkipParams(
        policy=rng.choice(["never", "ffn_skip"]),
        threshold=rng.choice([-1.0, 0.5, 0.86, 0.95, 1.0]),
        warmup_tokens=rng.choice([0, 2, 25]),
        cold_start=rng.randrange(NUM_LAYERS),
        cold_end=NUM_LAYERS,
        max_skips=rng.choice([None, 0, 1]),
    )
    params = SamplingParams(
        max_tokens=rng.choice([1, 8, 60]),
        temperature=rng.choice([0.0, 1.0, 2.0]),
        top_p=rng.choice([0.3, 1.0]),
        top_k=rng.choice([0, 1, 5]),
        min_p=rng.choice([0.0, 0.9]),
        repetition_penalty=rng.choice([0.1, 1.0, 2.0]),
        presence_penalty=rng.choice([-2.0, 0.0, 2.0]),
        frequency_penalty=rng.choice([-2.0, 0.0, 2.0]),
        logit_bias=rng.choice([(), ((3, 100.0), (VOCAB - 1, -100.0))]),
        seed=rng.randrange(2**63),
        logprobs=rng.choice([None, 0, 20]),
        stop_token_ids=rng.choice([(), tuple(range(0, VOCAB, 9))]),
        grammar=rng.choice([None, None, *GRAMMARS]),
        skip=skip,
    )
    return prompt_ids, params


def serve_the_victim(engine: Engine, rng: random.Random) -> list[SeqOutput]:
    """Neighbours come and go, finished or aborted, until the victim has ended."""
    victim_id, arrives_at = -1, rng.randrange(12)
    outputs: list[SeqOutput] = []
    for now in range(200):
        if now == arrives_at:
            engine.add(victim_id, *VICTIM)
        if now < 20 and rng.random() < 0.5:
            engine.add(now, *hostile_neighbour(rng))
        if rng.random() < 0.1:
            engine.abort(rng.randrange(20))
        step = engine.step()
        outputs += [out for out in (step.outputs if step else ()) if out.seq_id == victim_id]
        if outputs and outputs[-1].finish_reason:
            return outputs
    raise AssertionError("the victim did not end")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("tiny"))


def test_hostile_neighbours_leave_a_request_alone(model_dir: Path) -> None:
    config = engine_config(
        model_dir,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        max_model_len=8 * 16,
        kv_cache_memory_bytes=8 * BLOCK_BYTES,
    )
    runner = TorchModelRunner(config)
    alone = generate(runner, config, [VICTIM])[0]
    num_preemptions = num_cached = 0
    for seed in range(NUM_BATCHES):
        rng = random.Random(seed)
        outputs = serve_the_victim(tiny_engine(runner, config), rng)
        num_preemptions += outputs[-1].num_preemptions
        num_cached += outputs[0].num_cached_tokens > 0
        assert text(outputs) == text(alone)
        assert skipped(outputs) == skipped(alone)
        assert outputs[-1].skip_usage == alone[-1].skip_usage
    assert num_preemptions > 0
    assert 0 < num_cached < NUM_BATCHES
    assert len(set(skipped(alone))) > 2, "the victim hardly skips"
