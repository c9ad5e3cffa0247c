"""Without a GPU the kernels are at least compiled for one: Triton's own compiler and assembler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from skipllm_core.kernels.gpu.decoder import GpuDecoder
from skipllm_core.kernels.gpu.rows import DeviceRows
from skipllm_core.model.loader import load_model
from skipllm_core.runner.device_sampler import DeviceSampler, SamplingKind
from skipllm_core.model.kv_cache import KVCache
from tests.runner.tiny import write_config


class Hopper:  # what the compiler asks of a driver
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0


driver.set_active(Hopper())
names = set()
SHARED_MEMORY = 99 * 2**10  # bytes of a program on an RTX 4090; an A100 has 163 KiB, an H100 227


def compile_instead(kernel, grid):
    def launch(*args, **kwargs):
        code = kernel.warmup(*args, grid=grid, **kwargs)
        assert code.asm["cubin"]
        assert code.metadata.shared <= SHARED_MEMORY, (kernel.__name__, kwargs)
        if kernel.__name__ in ("down_kernel", "neurons_kernel"):  # weights are asked for ahead
            assert "cp.async" in code.asm["ptx"], (kernel.__name__, kwargs)
        names.add(kernel.__name__)
    return launch


JITFunction.__getitem__ = compile_instead
cpu, dtype = torch.device("cpu"), getattr(torch, sys.argv[3])


def decoders(rows, **changes):
    write_config(Path(sys.argv[1]), hidden_size=256, intermediate_size=8448, **changes)
    model = load_model(
        Path(sys.argv[1]),
        device=cpu,
        dtype=dtype,
        load_format="dummy",
        quantization=sys.argv[2],
    )
    cache = KVCache(model.config, num_blocks=32, block_size=16, dtype=dtype, device=cpu)
    return [GpuDecoder(model, cache, rows, consensus=joint) for joint in (False, True)]


rows = DeviceRows(max_num_rows=256, max_blocks=16, num_layers=2, vocab_size=512, device=cpu)
alone, joint = decoders(rows, num_hidden_layers=2)
for num_rows in (1, 2, 32, 256):  # one for each height of the tiles
    alone.step(num_rows, "stock")
    joint.step(num_rows, "skip")
    alone.step(num_rows, "skip")
    alone.step(num_rows, "neurons")
    joint.step(num_rows, "neurons")
    DeviceSampler(rows).step(num_rows, SamplingKind.DRAW)
for head_dim in (64, 96, 128, 256):
    for family in ("llama", "qwen3"):  # whose heads are normed
        changes = {"model_type": family, "head_dim": head_dim, "num_hidden_layers": 1}
        architecture = {"architectures": [f"{family.capitalize()}ForCausalLM"]}
        decoders(rows, **changes, **architecture)[0].step(1, "stock")
print(*sorted(names))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ("none", "bfloat16"),
        ("int8", "bfloat16"),
        ("fp8", "bfloat16"),
        ("none", "float16"),
        ("none", "float32"),
    ],
)
def test_every_kernel_of_a_step_compiles_for_hopper_and_has_room_there(
    quantization: str, dtype: str, tmp_path: Path
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), quantization, dtype],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [
        "_attend",
        "_choose",
        "_decide_together",
        "_embed",
        "_exponentials_kernel",
        "_merge",
        "_tell",
        "_tell_stock",
        "add_parts_kernel",
        "count_kernel",
        "down_kernel",
        "gate_up_kernel",
        "limit_kernel",
        "linear_kernel",
        "neurons_kernel",
    ]
