"""One case of `skipllm bench gpu`: a model, a batch and a context, under every policy."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from skipllm_core.bench.gpu.measurement import GpuMeasurement, GpuPolicy, Item, Told
from skipllm_core.bench.gpu.steps import Fit, StepBench
from skipllm_core.bench.gpu.triggers import TriggerSpread

NATURAL_SHARE = 0.25  # of the blocks that rows are to skip by their own similarities
# Of neurons, before up and of the rest before down: nothing, then 0.2, 0.33 and 0.34 of the bytes.
NEURON_SHARES = ((0.0, 0.0), (0.3, 0.0), (0.5, 0.0), (0.3, 0.6))
VARYING_MS = 800.0  # about, for the steps of rows that trigger by chance
MOST_VARYING_STEPS, LEAST_VARYING_STEPS = 200, 20


class CaseBench:
    """Measures a `StepBench`; `bytes_per_s` is what the device reads at most."""

    def __init__(
        self,
        bench: StepBench,
        *,
        shape: str,
        dtype: str,
        quantization: str,
        bytes_per_s: float,
        num_replays: int,
    ) -> None:
        self.bench = bench
        self.what = f"{shape}, {quantization}, batch {bench.batch}, context {bench.context}"
        self._names = (shape, dtype, quantization)
        self._bytes_per_s = bytes_per_s
        self._num_replays = num_replays
        ffn = bench.model.blocks[0].ffn
        self._block_bytes = sum(
            one.weight.numel() * one.weight.itemsize for one in (ffn.gate_up, ffn.down)
        )
        self.never_ms = bench.never(num_replays)

    def measure(self, forced_skips: Sequence[int]) -> Iterator[Item]:
        bench, num_replays = self.bench, self._num_replays
        yield self._row("never", self.never_ms)
        yield self._row("gate only", bench.gate_alone(num_replays))
        counts = [count for count in forced_skips if count <= bench.last_skippable]
        times = []
        for count in counts:
            times.append(bench.forced([count] * bench.batch, num_replays))
            yield self._row("forced", times[-1], mean=count, joint=count)
        fit = Fit.of(counts, times) if len(set(counts)) > 1 else None
        if fit is not None:
            yield Told(
                f"{self.what}: ms = {fit.full_ms:.3f} - {fit.block_ms * 1e3:.1f} us x blocks "
                f"skipped, off by {fit.max_residual_ms:.3f} ms at most",
                {"fit": self.what, "full_ms": fit.full_ms, "block_ms": fit.block_ms},
            )
        ms, skipped = bench.natural(NATURAL_SHARE * bench.num_layers, num_replays)
        mean, joint = statistics.fmean(skipped), min(skipped)
        yield self._row("ffn_skip", ms, mean=mean, joint=joint, full_ms=self.never_ms, fit=fit)
        if bench.batch > 1 and fit is not None:
            yield from self._measure_mixed(fit)
        yield from self._measure_neurons("neurons", fit)
        if bench.batch > 1:
            yield from self._measure_neurons("neurons together", fit)

    def _measure_neurons(self, policy: GpuPolicy, fit: Fit | None) -> Iterator[Item]:
        """Against the same kernels with nothing left out; ideal is what the weights that no row
        wants are worth by the fit of whole blocks."""
        full_ms: float | None = None
        for shares in NEURON_SHARES:
            together = policy == "neurons together"
            found = self.bench.neurons(shares, self._num_replays, together=together)
            full_ms = full_ms or found.ms
            yield self._row(
                policy,
                found.ms,
                mean=found.mean,
                joint=found.joint,
                full_ms=full_ms,
                fit=fit,
            )

    def _measure_mixed(self, fit: Fit) -> Iterator[Item]:
        """Rows that trigger by chance, anew in each step, against steps in which nobody skips."""
        bench = self.bench
        spread = TriggerSpread(NATURAL_SHARE * bench.num_layers, bench.last_skippable)
        wanted = int(VARYING_MS / self.never_ms)
        num_steps = max(LEAST_VARYING_STEPS, min(MOST_VARYING_STEPS, wanted))
        steps = spread.draw(bench.batch, num_steps)
        full_ms = bench.varying([[0] * bench.batch] * num_steps)
        ms = bench.varying(steps)
        expected = spread.expected_saved(bench.batch)
        drawn = statistics.fmean(min(step) for step in steps)
        saved_ms, expected_ms = full_ms - ms, expected * fit.block_ms
        yield self._row(
            "mixed",
            self.never_ms - saved_ms,
            mean=statistics.fmean(count for step in steps for count in step),
            joint=drawn,
            full_ms=self.never_ms,
            fit=fit,
            expected_joint=expected,
        )
        yield Told(
            f"{self.what}: rows that trigger by chance save {saved_ms:.3f} ms; expected "
            f"{expected_ms:.3f}, for E[blocks saved] = {expected:.2f} (drawn: {drawn:.2f}): "
            f"{_deviation(saved_ms, expected_ms)}"
        )

    def row_of_if_nodes(self, ms: float, num_skipped: int) -> Item:
        """Every row skipped so many blocks, with the FFNs behind IF nodes of the graph."""
        return self._row("if nodes", ms, mean=num_skipped, joint=num_skipped)

    def _row(
        self,
        policy: GpuPolicy,
        ms: float,
        *,
        mean: float | None = None,
        joint: float = 0.0,
        full_ms: float | None = None,
        fit: Fit | None = None,
        expected_joint: float | None = None,
    ) -> GpuMeasurement:
        """`mean`: blocks that a row skips; `joint`: those that all rows do."""
        bench = self.bench
        num_bytes = bench.bytes_per_step - joint * self._block_bytes
        saved = None if full_ms is None else full_ms - ms
        worth = joint if expected_joint is None else expected_joint
        shape, dtype, quantization = self._names
        return GpuMeasurement(
            model=shape,
            device=str(bench.device),
            dtype=dtype,
            quantization=quantization,
            policy=policy,
            batch=bench.batch,
            context=bench.context,
            ms_per_step=ms,
            tokens_per_s=bench.batch / ms * 1e3,
            skipped_blocks=mean,
            ceiling_share=num_bytes / self._bytes_per_s / (ms / 1e3),
            speedup_vs_never=self.never_ms / ms,
            token_skip_ratio=(mean or 0.0) / bench.num_layers,
            weight_skip_ratio=joint / bench.num_layers,
            saved_ms=saved,
            expected_saved_ms=None if fit is None else worth * fit.block_ms,
        )


def _deviation(found: float, expected: float) -> str:
    return f"{found / expected - 1:+.1%}" if expected else "nothing to be saved"
