"""`skipllm bench gpu` on the terminal: every item as it is measured, then a table of the cases."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from skipllm_core.bench.gpu.measurement import GpuMeasurement, GpuPolicy, Item
from skipllm_core.bench.gpu.plan import Plan, PlanBench
from skipllm_core.bench.gpu.steps import Fit
from skipllm_core.bench.gpu.targets import targets
from skipllm_core.errors import ConfigError
from skipllm_core.runner.graphs import CudaCapture

logger = logging.getLogger(__name__)

FILE_WIDTH = 150  # of the output where it is no terminal, so that the table is not folded


@torch.inference_mode()
def run_plan(plan: Plan, json_file: Path | None, plot_file: Path | None) -> None:
    """Measures, prints, writes a JSON object a line as soon as it is measured, and draws. Raises
    ConfigError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "skipllm bench gpu needs a CUDA device that torch can use; without one, "
            "skipllm bench decode measures the CPU"
        )
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    console = Console(highlight=False, markup=False)  # errors may have brackets
    if not console.is_terminal:
        console.width = FILE_WIDTH
    bench = PlanBench(plan, device=device, dtype=torch.bfloat16, make_capture=CudaCapture)
    about = {"device_name": name, "torch": torch.__version__}
    report(bench.items(), about, console, json_file, plot_file)


def report(
    items: Iterable[Item],
    about: Mapping[str, str],
    console: Console,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """`about` is the first line, of the output and of the JSON."""
    console.print(f"{about['device_name']}, torch {about['torch']}", soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps(dict(about)) + "\n", encoding="utf-8")

    def keep(item: Mapping[str, Any]) -> None:
        if json_file is not None:
            with json_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(item) + "\n")

    rows: list[GpuMeasurement] = []
    try:
        for item in items:
            if isinstance(item, GpuMeasurement):
                rows.append(item)
                keep(asdict(item))
                console.print(_line(item), soft_wrap=True)
            else:
                if item.facts:
                    keep(item.facts)
                console.print(item.text, soft_wrap=True)
    finally:  # what was measured before an interruption is worth telling
        console.print(gpu_table(rows))
        for target in targets(rows):
            console.print(f"target: {target}", soft_wrap=True)
        if plot_file is not None:
            try:
                draw(rows, plot_file, about["device_name"], console)
            except Exception:
                logger.warning("%s is not written", plot_file, exc_info=True)


def draw(rows: Sequence[GpuMeasurement], path: Path, device_name: str, console: Console) -> None:
    """The plot, if there is something to plot."""
    from skipllm_core.bench.gpu.plot import plot_steps

    if not any(row.policy == "forced" for row in rows):
        console.print(f"{path} is not written: no forced skip was measured", soft_wrap=True)
        return
    plot_steps(rows, path, device_name=device_name)
    console.print(f"wrote {path}", soft_wrap=True)


def gpu_table(rows: Sequence[GpuMeasurement]) -> Table:
    """A line per case; what leaving out neurons saves stands in the steps' own lines."""
    table = Table(
        "model", "weights", "batch", "context", "never, ms", "tokens/s", "ceiling", "gate alone",
        "k: ms = a - k b", "ffn_skip, at", "mixed, of expected",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for case in dict.fromkeys(row.case for row in rows):
        found = [row for row in rows if row.case == case]
        never = _of(found, "never")
        if never is None:
            continue
        gate, natural, mixed = (_of(found, p) for p in ("gate only", "ffn_skip", "mixed"))
        table.add_row(
            *map(str, case),
            f"{never.ms_per_step:.3f}",
            f"{never.tokens_per_s:.0f}",
            _percent(never.ceiling_share),
            "" if gate is None else f"{gate.ms_per_step / never.ms_per_step - 1:+.1%}",
            _fit(found),
            "" if natural is None else _speedup(natural),
            "" if mixed is None else _saved(mixed),
        )
    return table


def _of(rows: Sequence[GpuMeasurement], policy: GpuPolicy) -> GpuMeasurement | None:
    return next((row for row in rows if row.policy == policy), None)


def _line(row: GpuMeasurement) -> str:
    skipped = "" if row.skipped_blocks is None else f" {row.skipped_blocks:.4g}"
    ceiling = "" if row.ceiling_share is None else f", {row.ceiling_share:.0%} of the bandwidth"
    speedup = "" if row.speedup_vs_never is None else f", {row.speedup_vs_never:.3f}x never"
    saved = _saved(row)
    saved = f", saves {saved} of what is expected" if saved else ""
    return (
        f"{row.model}, {row.weights}, batch {row.batch}, context {row.context}: "
        f"{row.policy}{skipped}: {row.ms_per_step:.3f} ms, {row.tokens_per_s:.0f} tokens/s"
        f"{ceiling}{speedup}{saved}"
    )


def _fit(rows: Sequence[GpuMeasurement]) -> str:
    forced = [row for row in rows if row.policy == "forced"]
    skipped = [row.skipped_blocks or 0.0 for row in forced]
    if len(set(skipped)) < 2:
        return ""
    fit = Fit.of(skipped, [row.ms_per_step for row in forced])
    return f"{fit.full_ms:.3f} - {fit.block_ms * 1e3:.1f} us k"


def _speedup(row: GpuMeasurement) -> str:
    return f"{row.speedup_vs_never:.3f}x, {_percent(row.weight_skip_ratio)}"


def _saved(row: GpuMeasurement) -> str:
    if row.saved_ms is None or not row.expected_saved_ms:
        return ""
    return f"{row.saved_ms:.3f} ms, {row.saved_ms / row.expected_saved_ms:.0%}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
