"""What `skipllm bench gpu` prints, writes and draws of its measurements."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton", reason="Triton has no build for this platform")

from server.cli.app import app
from skipllm_core.bench.gpu import report as gpu_report
from skipllm_core.bench.gpu.measurement import GpuMeasurement, Told
from skipllm_core.bench.gpu.plan import Plan
from skipllm_core.bench.gpu.report import draw, report
from skipllm_core.bench.gpu.targets import targets


def made_up_rows() -> list[GpuMeasurement]:
    def row(policy: Any, batch: int, skipped: float | None, ms: float, **more: Any) -> Any:
        return GpuMeasurement(
            model="llama-2-7b",
            device="cuda:0",
            dtype="bfloat16",
            policy=policy,
            batch=batch,
            skipped_blocks=skipped,
            ms_per_step=ms,
            tokens_per_s=batch / ms * 1e3,
            speedup_vs_never=3.5 / ms,
            token_skip_ratio=(skipped or 0) / 32,
            **{"quantization": "none", "context": 512} | more,
        )

    rows = [row("never", 1, None, 3.5), row("gate only", 1, None, 3.55)]
    rows += [row("forced", 1, k, 3.5 - 0.06 * k) for k in (0, 4, 8, 10)]
    rows += [row("forced", 8, k, 4.0 - 0.055 * k) for k in (0, 8)]
    rows += [row("mixed", 8, 6.5, 3.8, saved_ms=0.2, expected_saved_ms=0.25)]
    rows += [row("never", 1, None, 2.3, quantization="int8")]
    rows += [row("forced", 1, k, 2.2 - 0.03 * k, quantization="int8") for k in (0, 8)]
    return [*rows, row("transformers eager", 1, None, 28.0)]


def test_the_plot_has_a_fit_per_batch_and_speedups_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    path = tmp_path / "steps.png"
    console = Console(file=io.StringIO())
    draw(made_up_rows(), path, "NVIDIA H200", console)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (figure,) = figures
    times, speedups, int8_times, _ = figure.axes
    assert times.get_title(loc="left") == "llama-2-7b, bfloat16, context 512"
    assert int8_times.get_title(loc="left") == "llama-2-7b, int8, context 512"
    labels = [text.get_text() for text in times.get_legend().get_texts()]
    assert labels == ["batch 1: 3.500 ms - 60.0 us k", "batch 8: 4.000 ms - 55.0 us k"]
    (fit, points) = times.get_lines()[:2]
    assert list(fit.get_xdata()) == [0, 10]
    assert list(fit.get_ydata()) == pytest.approx([3.5, 2.9])
    assert list(points.get_ydata()) == pytest.approx([3.5, 3.26, 3.02, 2.9])
    marks = {line.get_marker(): list(line.get_ydata()) for line in speedups.get_lines()[:4]}
    assert marks["D"] == pytest.approx([3.5 / 3.55])
    assert marks["s"] == pytest.approx([3.5 / 3.8])


def test_the_report_keeps_what_was_measured_before_it_broke_off(tmp_path: Path) -> None:
    def items() -> Any:
        yield Told("memory: copies 4000 GB/s", {"copy_bytes_per_s": 4e12})
        yield from made_up_rows()
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=150)
    path = tmp_path / "gpu.jsonl"
    about = {"device_name": "NVIDIA H200", "torch": "2.11"}
    with pytest.raises(KeyboardInterrupt):
        report(items(), about, console, path, tmp_path / "gpu.png")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:2] == [about, {"copy_bytes_per_s": 4e12}]
    assert [line["policy"] for line in lines[2:]] == [row.policy for row in made_up_rows()]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "llama-2-7b, bfloat16, batch 1, context 512: forced 8: 3.020 ms" in text
    assert "3.500 - 60.0 us k" in text
    assert "target: no skip: 3.50 ms (at most 3.65 ms): met" in text
    assert (tmp_path / "gpu.png").exists()


def test_the_command_names_the_device_and_reports_the_plans_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bench:
        def __init__(self, plan: Plan, **settings: Any) -> None:
            assert settings["dtype"] == torch.bfloat16
            self.text = f"left out: {plan.shapes[0]} [/] in brackets"

        def items(self) -> list[Told]:
            return [Told(self.text)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(gpu_report, "PlanBench", Bench)
    path = tmp_path / "gpu.jsonl"
    result = CliRunner().invoke(app, ["bench", "gpu", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"NVIDIA H200, torch {torch.__version__}")
    assert "left out: llama-2-7b [/] in brackets" in result.output
    about = {"device_name": "NVIDIA H200", "torch": torch.__version__}
    assert json.loads(path.read_text()) == about


def test_targets_are_held_against_what_was_measured() -> None:
    lines = dict(line.split(": ", 1) for line in targets(made_up_rows()))
    assert lines["25% of the blocks skipped, by the fit"] == "1.159x (at least 1.15x): met"
    assert lines["30% of the blocks skipped, by the fit"] == "1.197x (at least 1.18x): met"
    assert lines["the gate, nothing skipped"] == "+1.4% (at most +2 %): met"
    assert lines["over transformers eager"] == "8.0x (at least 8x): met"
    assert lines["no skip, W8A16"] == "2.30 ms (at most 2.2 ms): NOT met"
    assert lines["batch 8, saved against E[blocks saved]"] == "-20.0% (within 10 %): NOT met"
    assert not list(targets([]))


def test_without_a_forced_skip_there_is_nothing_to_draw(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    draw(made_up_rows()[:2], tmp_path / "steps.png", "NVIDIA H200", console)
    assert not (tmp_path / "steps.png").exists()
    assert "is not written: no forced skip was measured" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_plot_that_cannot_be_written_is_told_before_anything_is_measured() -> None:
    result = CliRunner().invoke(app, ["bench", "gpu", "--plot", "/nowhere/at/all.png"])
    assert result.exit_code != 0
    assert "cannot write /nowhere/at/all.png" in result.output
