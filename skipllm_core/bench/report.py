"""A benchmark as people see it: lines about the machine, progress, a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from skipllm_core.bench.decode import OnProgress
from skipllm_core.bench.machine import last_level_cache_bytes
from skipllm_core.bench.measurement import DecodeMeasurement
from skipllm_core.bench.prefill import PrefillMeasurement
from skipllm_core.bench.roofline import StepBytes
from skipllm_core.bench.setup import Machine

NOTHING = "-"


def print_line(console: Console, heading: str, text: str) -> None:
    console.print(f"{heading:<10} {text}", soft_wrap=True, markup=False)


def print_machine(console: Console, machine: Machine) -> None:
    threads = f"{machine.num_threads} thread{'s' * (machine.num_threads != 1)}"
    print_line(
        console, "device", f"{machine.device_name}, {threads}, torch {machine.torch_version}"
    )
    bandwidth = machine.bandwidth
    print_line(
        console,
        "bandwidth",
        f"reads {bandwidth.bytes_per_s / 1e9:.2f} GB/s "
        f"({bandwidth.kind}, over {size(bandwidth.buffer_bytes)})",
    )


def print_model(
    console: Console, name: str, num_parameters: int, computes: str, *, is_random: bool
) -> None:
    weights = ", random weights" if is_random else ""
    print_line(
        console, "model", f"{name}, {num_parameters / 1e6:.4g}M parameters{weights}, {computes}"
    )


def print_ceilings(
    console: Console,
    step_bytes: dict[int, StepBytes],
    read_bytes_per_s: float,
    device: str,
) -> None:
    """What a step that skips nothing reads at each batch size, and how fast it can be at best."""
    for batch, found in step_bytes.items():
        step_s = found.full / read_bytes_per_s
        print_line(
            console,
            "ceiling",
            f"batch {batch} reads {size(found.full)} a step: at best {_digits(step_s * 1e3)} ms, "
            f"{_digits(batch / step_s)} tokens/s",
        )
    cache_bytes = last_level_cache_bytes()
    least = min(found.full for found in step_bytes.values())
    if device == "cpu" and cache_bytes is not None and least < 2 * cache_bytes:
        print_line(
            console,
            "warning",
            f"the caches hold {size(cache_bytes)}, so a step finds much of what it reads there: "
            "it may beat the ceiling, and skipping may gain less",
        )


def status(what: str) -> AbstractContextManager[object]:
    progress = Progress(
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
    )
    progress.add_task(f"{what} ...")
    return progress


@contextmanager
def step_progress() -> Iterator[OnProgress]:
    """Drawn between the turns, and not by a thread that would take its time from them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(
            task, description=what, completed=done, total=total, refresh=True
        )


def decode_table(measurements: Sequence[DecodeMeasurement]) -> Table:
    is_compared = any(found.speedup_vs_transformers is not None for found in measurements)
    table = _table()
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    headings = ["ms /\nstep", "tokens\n/ s", "of\nceiling", "left\nout", "weight\nskip"]
    headings += ["vs\nnever", "of\nideal", *(["vs\ntrans-\nformers"] if is_compared else [])]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    batch = measurements[0].batch
    for found in measurements:
        if found.batch != batch:
            table.add_section()
            batch = found.batch
        is_ours = found.engine == "skipllm"
        cells = [
            str(found.batch),
            found.label,
            _digits(found.ms_per_step),
            _digits(found.tokens_per_s),
            _percent(found.ceiling_share),
            _percent(found.skipped_ffn_share if is_ours else None, digits=1),
            _percent(found.weight_skip_ratio if is_ours else None, digits=1),
            _times(found.speedup_vs_never),
            _percent(found.share_of_ideal),
        ]
        if is_compared:
            cells.append(_times(found.speedup_vs_transformers))
        table.add_row(*cells)
    return table


def decode_remarks(measurements: Sequence[DecodeMeasurement]) -> list[str]:
    """What the table has no column for."""
    costs = [
        f"{found.gate_cost:+.1%} at batch {found.batch}"
        for found in measurements
        if found.gate_cost is not None
    ]
    remarks = [f"the gate, when nothing is skipped, costs {', '.join(costs)}"] if costs else []
    equal = [
        f"{found.tokens_equal_transformers:.1%} at batch {found.batch}"
        for found in measurements
        if found.tokens_equal_transformers is not None
    ]
    if equal:
        remarks.append(f"greedy tokens equal to transformers': {', '.join(equal)}")
    return remarks


def prefill_table(measurements: Sequence[PrefillMeasurement]) -> Table:
    is_compared = any(found.speedup_vs_transformers is not None for found in measurements)
    table = _table()
    table.add_column("tokens", justify="right")
    table.add_column("engine")
    for heading in ("ms", "tokens / s", *(["vs transformers"] if is_compared else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in measurements:
        cells = [
            str(found.num_tokens),
            found.engine,
            _digits(found.ms_per_prefill),
            _digits(found.tokens_per_s),
        ]
        if is_compared:
            cells.append(_times(found.speedup_vs_transformers))
        table.add_row(*cells)
    return table


def size(num_bytes: float) -> str:
    """In units of 1000, as bandwidths are."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def _table() -> Table:
    """Narrow enough for 80 columns."""
    return Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)


def _digits(number: float) -> str:
    """To about four digits."""
    decimals = 0 if number >= 1000 else 1 if number >= 100 else 2 if number >= 1 else 3
    return f"{number:.{decimals}f}"


def _percent(share: float | None, digits: int = 0) -> str:
    return NOTHING if share is None else f"{share:.{digits}%}"


def _times(factor: float | None) -> str:
    return NOTHING if factor is None else f"{factor:.2f}x"
