"""What the device's memory is reckoned to hold, and what is said when it does not suffice."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipllm_core.config import EngineConfig
from skipllm_core.errors import ConfigError
from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.runner import device_sampler, model_runner
from skipllm_core.runner.device_sampler import STEP_BYTES_PER_LOGIT, DeviceSampler, SamplingKind
from skipllm_core.runner.gpu_runner import GpuModelRunner
from skipllm_core.runner.graphs import NODE_BYTES, direct, reserve_bytes
from skipllm_core.runner.memory import allocated_bytes, held_tensors
from skipllm_core.runner.model_runner import TorchModelRunner
from tests.runner.reference_decoder import ReferenceDecoder
from tests.runner.tiny import NUM_LAYERS, VOCAB, engine_config, write_config

CPU, NOWHERE = torch.device("cpu"), torch.device("meta")
GIB = 2**30


def run_out(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")


def eager(config: EngineConfig) -> TorchModelRunner:
    return TorchModelRunner(config)


def by_graphs(config: EngineConfig) -> TorchModelRunner:
    return GpuModelRunner(config, ReferenceDecoder, lambda: direct)


@pytest.mark.parametrize("build", [eager, by_graphs])
@pytest.mark.parametrize("place", ["load_model", "KVCache.__init__", "cpu_budget_bytes"])
def test_memory_that_runs_out_anywhere_is_told_with_what_to_lower(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[EngineConfig], TorchModelRunner],
    place: str,
) -> None:
    config = engine_config(write_config(tmp_path), kv_cache_memory_bytes=None, enforce_eager=True)
    monkeypatch.setattr(f"skipllm_core.runner.model_runner.{place}", run_out)
    with pytest.raises(ConfigError, match=r"--max-num-seqs \(8\).*int8: CUDA.* 7 GiB$") as caught:
        build(config)
    assert "--gpu-memory-utilization (0.9)" in str(caught.value)


@pytest.mark.parametrize(
    ("says", "raised"),
    [
        ("Triton Error [CUDA]: out of memory", ConfigError),
        ("Triton Error [CUDA]: an illegal memory access was encountered", RuntimeError),
    ],
)
def test_the_drivers_memory_that_runs_out_is_told_alike_and_nothing_else_is(
    tmp_path: Path, says: str, raised: type[Exception]
) -> None:
    def make(*_: object) -> ReferenceDecoder:
        raise RuntimeError(says)

    config = engine_config(write_config(tmp_path), enforce_eager=True)
    with pytest.raises(raised, match=re.escape(says)):
        GpuModelRunner(config, make, lambda: direct)


def test_weights_that_a_device_has_no_room_for_are_told_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipllm_core.model.loader.LlamaModel", run_out)
    config = engine_config(write_config(tmp_path), quantization="int8")
    with pytest.raises(ConfigError, match=r"--kv-cache-memory \(16.0 MiB\): CUDA"):
        TorchModelRunner(config)


def test_rows_and_sampler_take_19_bytes_per_row_and_token_of_the_vocabulary() -> None:
    rows = DeviceRows(
        max_num_rows=64, max_blocks=256, num_layers=32, vocab_size=32_000, device=NOWHERE
    )
    # Logits, biases, counts and noise in 4 bytes; three masks in one.
    per_logit = 64 * 32_000 * 19
    # Block tables, masks, skipped layers, and before up and down thresholds and counts of neurons.
    tables = 64 * 4 * (256 + 32 + 32 + 64 + 64)
    per_row = 13 * 512 + 1536  # thirteen of up to 8 bytes a row, and the settings of 24
    small = 3 * 512  # consensus, num_needed, unread
    found = allocated_bytes([*held_tensors(rows), *held_tensors(DeviceSampler(rows))])
    assert found == per_logit + tables + per_row + small


def test_what_is_counted_is_what_is_allocated(tmp_path: Path) -> None:
    config = engine_config(
        write_config(tmp_path), enforce_eager=True, max_num_seqs=3, max_model_len=100
    )
    decoders = []

    def make(*parts: Any) -> GpuDecoder:
        decoders.append(GpuDecoder(*parts))
        return decoders[-1]

    runner = GpuModelRunner(config, make, lambda: lambda launch: launch)
    (decoder,) = decoders
    tensors = [*held_tensors(runner.rows), *held_tensors(runner.sampler), *decoder.buffers]
    assert all(tensor.device == CPU for tensor in tensors)
    reserve = reserve_bytes(3, NUM_LAYERS, VOCAB)
    assert runner._decode_bytes(config, 100) == allocated_bytes(tensors) + reserve


def test_every_tensor_of_the_decoder_is_among_its_buffers(tmp_path: Path) -> None:
    runner = TorchModelRunner(engine_config(write_config(tmp_path)))
    rows = DeviceRows(max_num_rows=2, max_blocks=2, num_layers=6, vocab_size=VOCAB, device=CPU)
    decoder = GpuDecoder(runner.model, runner.kv_cache, rows)
    held = [*held_tensors(decoder), *held_tensors(decoder._scratch), *decoder._state]
    held += decoder._neurons.tensors
    assert {id(tensor) for tensor in held} == {id(tensor) for tensor in decoder.buffers}


def test_the_graphs_reserve_grows_with_what_is_captured() -> None:
    # Llama-2-7B, 64 rows: 9 buckets of three steps (32 layers x 7, 9 and 12, and 6 launches each),
    # three samplings of 60, and sorts of 1 + 2 + 4 + 8 + 16 + 24 + 32 + 48 + 64 rows in 12 each.
    nodes = 9 * (32 * 28 + 3 * 6) + 9 * 3 * 60 + 199 * 12
    assert reserve_bytes(64, 32, 32_000) == nodes * NODE_BYTES + 64 * 32_000 * STEP_BYTES_PER_LOGIT
    assert 0.8 * GIB < reserve_bytes(64, 32, 32_000) < 0.95 * GIB


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators have made and that are not dropped yet."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given:
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self._drop, storage.nbytes())
        return out

    def _drop(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kind", SamplingKind)
def test_a_samplers_step_stays_within_what_is_reserved(
    monkeypatch: pytest.MonkeyPatch, kind: SamplingKind
) -> None:
    monkeypatch.setattr(device_sampler, "exponentials", lambda *_: None)  # allocates nothing
    rows = DeviceRows(max_num_rows=4, max_blocks=1, num_layers=1, vocab_size=4096, device=CPU)
    sampler = DeviceSampler(rows)
    with torch.inference_mode(), LiveBytes() as found:
        sampler.step(4, kind)
    assert found.most / (4 * 4096) < 26, "and more than twice as much is left for the sort's own"
    assert found.live == 0


@pytest.fixture
def gpu_of_80_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: dict[str, Any] = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "max_memory_allocated": lambda device: 14 * GIB,  # weights and activations
        "memory_reserved": lambda device: 13 * GIB,
        "mem_get_info": lambda device: (65 * GIB, 80 * GIB),  # so 2 GiB are not torch's
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.usefixtures("gpu_of_80_gib")
@pytest.mark.parametrize("build", [eager, by_graphs])
def test_the_cache_gets_what_everything_else_leaves_of_the_share(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[EngineConfig], TorchModelRunner],
) -> None:
    config = engine_config(write_config(tmp_path), enforce_eager=True, gpu_memory_utilization=0.75)
    runner = build(config)
    runner._device = torch.device("cuda", 0)
    monkeypatch.setattr(runner, "_run_largest_step", lambda *_: None)
    rounding = 2 * NUM_LAYERS * 2**21
    left = 60 * GIB - 2 * GIB - 14 * GIB - rounding
    kept = runner._decode_bytes(config, 256)
    assert (kept == 0) is (build is eager)
    assert runner._free_bytes(config, 256) == left - kept


def test_the_largest_step_ends_at_the_longest_context_and_samples_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(write_config(tmp_path), max_num_batched_tokens=20)
    runner = TorchModelRunner(config)
    contexts, sampled = [], []
    context, sample = runner.model.context, model_runner.sample

    def note_context(rows: Any, cache: Any) -> Any:
        contexts.append([(row.start, row.num_tokens) for row in rows])
        return context(rows, cache)

    def note_sample(logits: torch.Tensor, seqs: Any) -> Any:
        sampled.append(len(logits))
        return sample(logits, seqs)

    monkeypatch.setattr(runner.model, "context", note_context)
    monkeypatch.setattr(model_runner, "sample", note_sample)
    with torch.inference_mode():
        runner._run_largest_step(config, 256)
        runner._run_largest_step(config, 8)
    assert contexts == [[(236, 20)], [(0, 8), (0, 8)]]
    assert sampled == [8, 8]
