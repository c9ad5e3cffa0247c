"""On a CUDA device: TRITON_INTERPRET=0 python -m pytest -m gpu. (Never run so far.)"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from skipllm_core.bench.gpu.if_nodes import IfNodeDecoder, has_if_nodes
from skipllm_core.bench.gpu.steps import StepBench
from skipllm_core.config import EngineConfig
from skipllm_core.engine.engine import Engine
from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.model.loader import load_model
from skipllm_core.runner.gpu_runner import GpuModelRunner
from skipllm_core.runner.graphs import Capture, CudaCapture, direct
from skipllm_core.runner.model_runner import TorchModelRunner
from skipllm_core.types import SamplingParams, SeqOutput, SkipParams
from skipllm_core.worker import build_engine
from tests.runner.tiny import (
    NUM_LAYERS,
    engine_config,
    left_out,
    skipped,
    text,
    write_config,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SKIPS = [
    SkipParams(),
    SkipParams(policy="ffn_skip", threshold=0.9, warmup_tokens=2, cold_start=1, cold_end=5),
    SkipParams(policy="static", layers=(2, 4), warmup_tokens=3),
    SkipParams(policy="random", probability=0.5, warmup_tokens=0, cold_start=1, cold_end=5),
    SkipParams(policy="ffn_skip", threshold=-1.0, cold_start=1, cold_end=6, max_skips=2),
    SkipParams(
        policy="neurons",
        up_thresholds=(0.05,) * NUM_LAYERS,
        down_thresholds=(0.05,) * NUM_LAYERS,
        warmup_tokens=2,
    ),
]


def config_for(tmp_path: Path, **changes: object) -> EngineConfig:
    write_config(tmp_path, hidden_size=256, intermediate_size=512, max_position_embeddings=2048)
    settings = {"device": "cuda", "dtype": "float32", "kv_cache_memory_bytes": 2**28}
    return engine_config(tmp_path, **{**settings, **changes})


def answers(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    outputs = serve(engine, requests)
    return list(map(text, outputs))


def serve(engine: Engine, requests):  # type: ignore[no-untyped-def]
    for seq_id, (prompt, params) in enumerate(requests):
        engine.add(seq_id, prompt, params)
    outputs = [[] for _ in requests]  # type: ignore[var-annotated]
    while engine.has_work:
        step = engine.step()
        if step is not None:
            for output in step.outputs:
                outputs[output.seq_id].append(output)
    return outputs


def requests(max_tokens: int) -> list[tuple[list[int], SamplingParams]]:
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return [
        ([5 + n, 9, 40 + n], replace(greedy, skip=replace(skip, trace=True)))
        for n, skip in enumerate(SKIPS)
    ]


def serve_with(capture: Capture, config: EngineConfig) -> list[list[SeqOutput]]:
    runner = GpuModelRunner(config, GpuDecoder, lambda: capture)
    return serve(Engine(runner, config, runner.max_model_len), requests(100))


def test_a_replay_is_what_its_launches_are_bit_for_bit(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    replayed, launched = (serve_with(capture, config) for capture in (CudaCapture(), direct))
    assert list(map(text, replayed)) == list(map(text, launched))
    assert list(map(skipped, replayed)) == list(map(skipped, launched))
    assert list(map(left_out, replayed)) == list(map(left_out, launched))
    assert all(map(any, map(skipped, replayed[1:5]))), "blocks"
    assert any(left_out(replayed[5])), "neurons"


@pytest.mark.skipif(not has_if_nodes(), reason="torch before 2.12 captures no IF nodes")
@torch.inference_mode()
def test_if_nodes_skip_what_predication_skips(tmp_path: Path) -> None:
    write_config(tmp_path, hidden_size=256, intermediate_size=512)
    device = torch.device("cuda", 0)
    model = load_model(tmp_path, device=device, dtype=torch.float32, load_format="dummy")
    logits = []
    for decoder_type in (GpuDecoder, IfNodeDecoder):
        torch.manual_seed(0)
        bench = StepBench(
            model, batch=3, context=40, capture=CudaCapture(), decoder_type=decoder_type
        )
        for skips in ([0, 0, 0], [4, 2, 1], [4, 4, 4]):
            bench.forced(skips, 1)
            assert bench.rows.skipped.sum(dim=1).tolist() == skips
            logits.append(bench.rows.logits.clone())
    for predicated, behind_nodes in zip(logits[:3], logits[3:], strict=True):
        assert torch.equal(predicated, behind_nodes)


def test_graphs_say_what_torch_alone_says_for_a_thousand_steps(tmp_path: Path) -> None:
    engine = build_engine(config_for(tmp_path))
    assert isinstance(engine._runner, GpuModelRunner), "else torch is compared with itself"
    by_graphs = serve(engine, requests(1000))
    eager = build_engine(config_for(tmp_path, enforce_eager=True))
    assert type(eager._runner) is TorchModelRunner
    by_torch = serve(eager, requests(1000))
    # Rounding may flip a choice of random weights; what comes after one is another text.
    for mine, theirs in zip(by_graphs, by_torch, strict=True):
        pairs = list(zip(text(mine), text(theirs), strict=True))
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        assert same > 20
        assert skipped(mine)[:same] == skipped(theirs)[:same]


def test_a_second_run_of_the_same_graphs_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    engine = build_engine(config_for(tmp_path))
    first = answers(engine, requests(200))
    assert answers(engine, requests(200)) == first


def test_drawn_tokens_do_not_depend_on_batch_mates(tmp_path: Path) -> None:
    engine = build_engine(config_for(tmp_path))
    drawing = [
        (prompt, SamplingParams(max_tokens=50, temperature=1.0, seed=n, top_k=20, top_p=0.9))
        for n, (prompt, _) in enumerate(requests(50))
    ]
    together = answers(engine, drawing)
    assert [answers(engine, [one])[0] for one in drawing] == together


def test_bfloat16_and_8_bit_weights_serve(tmp_path: Path) -> None:
    for changes in ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}):
        found = answers(build_engine(config_for(tmp_path, **changes)), requests(30))
        assert all(len(tokens) == 30 for tokens in found)
