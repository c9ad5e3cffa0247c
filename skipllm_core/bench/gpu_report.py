"""`skipllm bench gpu` on the terminal: the device first, then every case, then the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from skipllm_core.bench.bandwidth import measure_read_bandwidth
from skipllm_core.bench.gpu import copy_bytes_per_s, empty_kernel_us, linear_gb_per_s
from skipllm_core.bench.gpu_plan import GpuMeasurement, Plan, Told, load_shape, measure_plan
from skipllm_core.errors import ConfigError
from skipllm_core.runner.graphs import CudaCapture


@torch.inference_mode()
def run_plan(plan: Plan, json_file: Path | None, plot_file: Path | None) -> None:
    """Measures, prints, writes a JSON object a line as soon as it is measured, and draws. Raises
    ConfigError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "skipllm bench gpu needs a CUDA device that torch can use; without one, "
            "skipllm bench decode measures the CPU"
        )
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    if json_file is not None:
        json_file.write_text("", encoding="utf-8")
    console = Console(highlight=False)
    copied = copy_bytes_per_s(device)
    read = measure_read_bandwidth(device).bytes_per_s
    console.print(f"device     {torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    console.print(f"bandwidth  copies {copied / 1e9:.0f} GB/s, reads {read / 1e9:.0f} GB/s")
    model = load_shape(plan.shapes[0], dtype, device, "none")
    for num_rows in (1, 2, 4, 8, 16):
        found = linear_gb_per_s(model, num_rows, CudaCapture())
        speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in found.items())
        console.print(f"linears    {plan.shapes[0]}, {num_rows} rows, GB/s: {speeds}")
    empty = empty_kernel_us(model, 1, CudaCapture())
    console.print(f"graph      a predicated kernel that does nothing: {empty:.2f} us")
    del model
    rows: list[GpuMeasurement] = []
    try:
        for item in measure_plan(
            plan,
            device=device,
            dtype=dtype,
            bytes_per_s=max(read, copied),
            make_capture=CudaCapture,
        ):
            if isinstance(item, Told):
                console.print(f"note       {item.text}")
                continue
            rows.append(item)
            if json_file is not None:
                with json_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(item)) + "\n")
    finally:  # what was measured before an interruption is worth telling
        console.print(gpu_table(rows))
        if plot_file is not None:
            draw(rows, plot_file, torch.cuda.get_device_name(device), console)


def draw(rows: Sequence[GpuMeasurement], path: Path, device_name: str, console: Console) -> None:
    """The plot, if there is something to plot."""
    from skipllm_core.bench.gpu_plot import plot_steps

    if not any(row.policy == "forced" for row in rows):
        console.print(f"note       {path} is not written: no forced skip was measured")
        return
    plot_steps(rows, path, device_name=device_name)
    console.print(f"wrote      {path}")


def gpu_table(rows: Sequence[GpuMeasurement]) -> Table:
    table = Table(
        "model", "weights", "batch", "context", "policy", "skipped", "ms", "tokens/s", "ceiling",
        "token skip", "weight skip", "vs never",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.model,
            row.dtype if row.quantization == "none" else row.quantization,
            str(row.batch),
            str(row.context),
            row.policy,
            "" if row.forced_skip is None else f"{row.forced_skip:g}",
            f"{row.ms_per_step:.3f}",
            f"{row.tokens_per_s:.0f}",
            _percent(row.ceiling_share),
            _percent(row.token_skip_ratio),
            _percent(row.weight_skip_ratio),
            "" if row.speedup_vs_never is None else f"{row.speedup_vs_never:.3f}x",
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
