"""`skipllm bench serve`, from options to one object of results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.cli.bench.client import STEP_SECONDS, WEIGHT_READS, Client, Counters
from server.cli.bench.report import print_report
from server.cli.bench.workload import CHAT, SAMPLE, prompts_of_file, random_prompts
from skipllm_core.bench.latency import RequestRecord, summarize
from skipllm_core.bench.load import Send, clock, closed_loop, open_loop, poisson_arrivals
from skipllm_core.errors import ConfigError

# With a special token's text, as most servers send no chunk for what has none.
_TO_THE_LAST_TOKEN = {"ignore_eos": True, "skip_special_tokens": False}


@dataclass(frozen=True)
class Benchmark:
    """What to send, and how fast. Without a rate, `max_concurrency` requests are under way."""

    base_url: str
    endpoint: str
    model: str | None  # None: the first one that the server names
    num_prompts: int
    request_rate: float | None  # per second
    max_concurrency: int
    input_len: int
    output_len: int
    prompts: Path | None  # a file, instead of random ones
    ignore_eos: bool
    temperature: float
    extra_body: Mapping[str, Any]
    slos_ms: Mapping[str, float]
    seed: int
    num_warmups: int
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)

    def settings(self) -> dict[str, Any]:
        """For the results: all that was chosen, but for the key."""
        settings = asdict(self)
        for name in ("base_url", "model", "slos_ms", "api_key"):  # stand elsewhere, or nowhere
            del settings[name]
        del settings["request_rate" if self.request_rate is None else "max_concurrency"]
        del settings["prompts" if self.prompts is None else "input_len"]
        if self.prompts is not None:
            settings["prompts"] = str(self.prompts)
        return settings


def run_benchmark(benchmark: Benchmark, json_file: Path | None) -> dict[str, Any]:
    """Measures, prints and writes. Raises ConfigError."""
    result = uvloop.run(measure(benchmark, Console(stderr=True, highlight=False)))
    if json_file is not None:
        json_file.write_bytes(orjson.dumps(result, option=orjson.OPT_INDENT_2) + b"\n")
    print_report(result, Console(highlight=False))
    return result


async def measure(benchmark: Benchmark, console: Console) -> dict[str, Any]:
    """Runs the benchmark, its progress on the console. Cancelled, it gives what was measured so
    far. Raises ConfigError where there is nothing to measure."""
    async with Client(
        benchmark.base_url, benchmark.endpoint, benchmark.api_key, benchmark.timeout_s
    ) as client:
        model = benchmark.model or await client.first_model()
        bodies = await _bodies(benchmark, client, model)
        await _warm_up(client, bodies[: benchmark.num_warmups])
        del bodies[: benchmark.num_warmups]

        before = await client.counters()
        records: list[RequestRecord] = []
        is_interrupted = False
        start_s = clock()
        with _progress(len(bodies), console) as show:

            async def send(body: bytes, intended_s: float) -> None:
                record = await client.send(body, intended_s)
                records.append(record)
                show(record)

            try:
                await _load(benchmark, bodies, send)
            except asyncio.CancelledError:  # Ctrl-C
                is_interrupted = True
        duration_s = clock() - start_s
        after = await client.counters()
    if not records:
        raise ConfigError("interrupted before any request had ended")
    return {
        "model": model,
        "base_url": client.base_url,
        "settings": benchmark.settings(),
        "is_interrupted": is_interrupted,
        **summarize(records, duration_s, benchmark.slos_ms),
        **_engine_use(before, after, duration_s),
    }


async def _bodies(benchmark: Benchmark, client: Client, model: str) -> list[bytes]:
    """What is sent, warm-ups first, made before the clock runs."""
    is_chat = benchmark.endpoint == CHAT
    num_prompts = benchmark.num_warmups + benchmark.num_prompts
    if benchmark.prompts is not None:
        prompts = prompts_of_file(benchmark.prompts, num_prompts, is_chat=is_chat)
    else:
        # Ids give prompts of the exact length; a tokenizer's own ids for words are valid ones.
        ids = None if is_chat else await client.tokenize(SAMPLE, model)
        prompts = random_prompts(
            num_prompts, benchmark.input_len, benchmark.seed, is_chat=is_chat, token_ids=ids
        )
    common = {
        "model": model,
        "max_tokens": benchmark.output_len,
        "temperature": benchmark.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(_TO_THE_LAST_TOKEN if benchmark.ignore_eos else {}),
        **benchmark.extra_body,
    }
    return [orjson.dumps(common | prompt) for prompt in prompts]


async def _warm_up(client: Client, bodies: list[bytes]) -> None:
    """Requests that do not count. Where they fail, so would the rest."""
    for record in await asyncio.gather(*(client.send(body, clock()) for body in bodies)):
        if record.error == "connection":
            raise client.not_there(record.error_message)
        if record.error is not None:
            raise ConfigError(f"the warm-up failed: {record.error}: {record.error_message}")


async def _load(benchmark: Benchmark, bodies: list[bytes], send: Send[bytes]) -> None:
    if benchmark.request_rate is None:
        await closed_loop(bodies, benchmark.max_concurrency, send)
    else:
        arrivals_s = poisson_arrivals(len(bodies), benchmark.request_rate, benchmark.seed)
        await open_loop(bodies, arrivals_s, send)


@contextmanager
def _progress(num_requests: int, console: Console) -> Iterator[Callable[[RequestRecord], None]]:
    """A bar on a terminal; gives what each ended request is shown to."""
    columns = (
        *(TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
        TextColumn("{task.fields[tokens]} output tokens, {task.fields[failed]} failed"),
    )
    # Drawing it takes time from the client: twice a second is enough.
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=num_requests, tokens=0, failed=0)
        shown = progress.tasks[0].fields

        def show(record: RequestRecord) -> None:
            progress.update(
                task,
                advance=1,
                tokens=shown["tokens"] + record.num_output_tokens,
                failed=shown["failed"] + (record.error is not None),
            )

        yield show


def _engine_use(
    before: Counters | None, after: Counters | None, duration_s: float
) -> dict[str, Any]:
    """From a SkipLLM server's metrics: the share of FFN weight reads that was avoided, and of the
    time that the engine computed. What is left of it is the most that HTTP, SSE and the hand-over
    between processes can have cost. None from other servers."""
    if before is None or after is None:
        return {"weight_skip_ratio": None, "engine_time_ratio": None}

    def increase(name: str) -> dict[str, float]:
        found = {label: value for (of, label), value in after.items() if of == name}
        return {label: value - before.get((name, label), 0.0) for label, value in found.items()}

    reads = increase(WEIGHT_READS)
    num_reads = sum(reads.values())
    return {
        "weight_skip_ratio": reads.get("avoided", 0.0) / num_reads if num_reads else None,
        "engine_time_ratio": {
            kind: seconds / duration_s for kind, seconds in increase(STEP_SECONDS).items()
        },
    }
