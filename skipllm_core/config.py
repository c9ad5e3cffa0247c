"""The engine's configuration: declared once, frozen, nothing resolved twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Quantization = Literal["none", "int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """Rows of a decode step skip together: phi and delta of skip/consensus.py."""

    share: float = 0.5
    slack: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the worker process needs to build its engine.

    `None` means "found at start": the value found stands in `EngineInfo`.
    """

    model_dir: Path  # a local directory with config.json and, unless load_format is dummy, weights
    tokenizer_dir: Path | None = None  # whose texts grammars are about; None: model_dir
    device: Device = "auto"
    dtype: DType = "auto"
    load_format: LoadFormat = "auto"
    quantization: Quantization = "none"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    # Enough to be bound by arithmetic and not by reading weights, on a GPU too; more would only
    # make running streams wait longer for a prefill step.
    max_num_batched_tokens: int = 512
    block_size: int = 16
    enable_prefix_caching: bool = True  # share the K/V of prompts that begin alike
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9  # of the device's memory, weights included (CUDA only)
    enforce_eager: bool = False  # torch's own operators only
    consensus: Consensus | None = None  # None: each row skips by itself (row_exact)
    num_threads: int | None = None  # CPU: threads of the worker; None: all usable cores
    seed: int = 0  # of dummy weights
    max_num_queued_reqs: int = 256
    max_queued_tokens: int = 1_000_000  # prompt tokens waiting, beyond which requests are refused
