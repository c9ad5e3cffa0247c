"""Hours of traffic on a virtual clock: the client's bounds, the engine and its scheduler are the
real ones; only the forward is not, and a cost model tells how long it would have taken.

What has to hold, whatever comes: requests are admitted in the order of their arrival (there is one
class of them); the queue is bounded; every accepted request ends; no block is lost; and who has
begun to run goes on after one step of the other kind at most.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from skipllm_core.client import EngineClient, RequestStream
from skipllm_core.engine.engine import Engine
from skipllm_core.engine.runner import Batch, StepResult
from skipllm_core.errors import OverloadedError
from skipllm_core.messages import Abort, Add, Command
from skipllm_core.sequence import Sequence
from skipllm_core.types import SamplingParams, SkipParams, StepOutput
from tests.engine.test_scheduler import SKIPPING, assert_pool_is_whole
from tests.fakes import FakeRunner, fake_engine

MAX_NUM_SEQS = 16
MAX_NUM_QUEUED_REQS = 64
MAX_QUEUED_TOKENS = 3000
CHUNK = 64  # max_num_batched_tokens
MAX_MODEL_LEN = 800


@dataclass(frozen=True)
class Phase:
    num_requests: int
    load: float  # of CAPACITY_PER_S
    max_tokens: tuple[int, ...] = (1, 2, 3, 5, 20)


# One after the other, over and over.
PHASES = (
    Phase(2000, 0.6),
    Phase(1000, 3.0),
    Phase(1000, 0.1),
    Phase(700, 1.0),
    Phase(300, 0.8, max_tokens=(90,)),  # all grow at once: the pool runs out
)


def step_s(kind: str, num_tokens: int) -> float:
    return 0.004 + (0.0005 if kind == "prefill" else 0.0002) * num_tokens


# A row's next step ends no later than after one step of the other kind and one of its own.
LONGEST_GAP_S = step_s("prefill", CHUNK) + step_s("decode", MAX_NUM_SEQS) + 1e-9
CAPACITY_PER_S = 45.0  # usual requests that these costs allow for, about


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class SimulatedRunner(FakeRunner):
    """Lets its clock go on, and looks at who was computed when."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(num_kv_blocks=88, block_size=8)
        self.clock = clock
        self.last_admitted = -1
        self.last_computed: dict[int, tuple[float, int]] = {}  # when, and preemptions until then

    def run(self, batch: Batch) -> StepResult:
        result = super().run(batch)
        self.batches.clear()
        self.clock.now_s += step_s(batch.kind, sum(row.num_tokens for row in batch.rows))
        for row in batch.rows:
            self._look(row.seq)
        return result

    def _look(self, seq: Sequence) -> None:
        last_s, num_preemptions = self.last_computed.get(seq.seq_id, (None, 0))
        if last_s is None:
            assert seq.seq_id > self.last_admitted, "not first come, first served"
            self.last_admitted = seq.seq_id
        elif num_preemptions == seq.num_preemptions:
            assert self.clock.now_s - last_s <= LONGEST_GAP_S, "a row had to wait for its turn"
        self.last_computed[seq.seq_id] = (self.clock.now_s, seq.num_preemptions)


class SimulatedClient(EngineClient):
    """Commands reach the engine between its steps, as a worker's do."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        super().__init__(
            max_num_queued_reqs=MAX_NUM_QUEUED_REQS, max_queued_tokens=MAX_QUEUED_TOKENS
        )
        self.info = engine.info
        self._engine = engine
        self._clock = clock
        self._set_health("ready")

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def _post(self, command: Command) -> None:
        match command:
            case Add(seq_id, prompt_ids, params):
                self._engine.add(seq_id, prompt_ids, params, self._clock())
            case Abort(seq_id):
                self._engine.abort(seq_id)

    @property
    def num_queued_tokens(self) -> int:
        return sum(s.num_prompt_tokens for s in self._streams.values() if s.is_queued)

    receive = EngineClient._on_step_output


@dataclass
class Simulation:
    num_requests: int
    rng: random.Random
    clock: Clock = field(default_factory=Clock)
    num_refused: int = 0
    num_aborted: int = 0
    num_preemptions: int = 0
    num_cache_hits: int = 0
    max_queue_s: float = 0.0

    def __post_init__(self) -> None:
        self.runner = SimulatedRunner(self.clock)
        self.engine = fake_engine(
            self.runner,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=CHUNK,
            clock=self.clock,
        )
        self.client = SimulatedClient(self.engine, self.clock)
        self.wanted: dict[int, int] = {}  # tokens that every unfinished request still waits for
        self._aborts: list[tuple[float, int, RequestStream]] = []  # a heap
        self._num_arrived = 0
        self._next_arrival_s = 0.0
        self._prefixes = [self._tokens(self.rng.choice([16, 40, 90])) for _ in range(30)]

    def run(self) -> None:
        while self._num_arrived < self.num_requests or self.engine.has_work:
            if not self.engine.has_work:
                self.clock.now_s = max(self.clock.now_s, self._next_arrival_s)
                self._let_clients_act()
            step = self.engine.step()
            self._let_clients_act()  # while the step was computed: they have not seen its outputs
            if step is not None:
                self._take(step)

    def _let_clients_act(self) -> None:
        now_s = self.clock.now_s
        while self._num_arrived < self.num_requests and self._next_arrival_s <= now_s:
            self._arrive()
        while self._aborts and self._aborts[0][0] <= now_s:
            _, seq_id, stream = heapq.heappop(self._aborts)
            if self.wanted.pop(seq_id, None):
                stream.close()
                self.num_aborted += 1

    def _arrive(self) -> None:
        self._num_arrived += 1
        self._next_arrival_s += self.rng.expovariate(self._phase.load * CAPACITY_PER_S)
        prompt_ids, params = self._request()
        try:
            stream = self.client.submit(prompt_ids, params)
        except OverloadedError:
            self.num_refused += 1
            return
        self.wanted[stream.seq_id] = params.max_tokens
        if self.rng.random() < 0.15:
            abort_s = self.clock.now_s + self.rng.expovariate(2.0)
            heapq.heappush(self._aborts, (abort_s, stream.seq_id, stream))

    @property
    def _phase(self) -> Phase:
        position = self._num_arrived % sum(phase.num_requests for phase in PHASES)
        for phase in PHASES:
            if position < phase.num_requests:
                return phase
            position -= phase.num_requests
        raise AssertionError

    def _request(self) -> tuple[list[int], SamplingParams]:
        rng = self.rng
        prompt_ids = self._tokens(rng.choice([4, 10, 20, 40]))
        if rng.random() < 0.6:
            prompt_ids = rng.choice(self._prefixes) + prompt_ids
        elif rng.random() < 0.03:
            prompt_ids = self._tokens(rng.randrange(200, 610))
        skip = SKIPPING if rng.random() < 0.5 else SkipParams()
        return prompt_ids, SamplingParams(max_tokens=rng.choice(self._phase.max_tokens), skip=skip)

    def _tokens(self, num_tokens: int) -> list[int]:
        return self.rng.choices(range(320), k=num_tokens)

    def _take(self, step: StepOutput) -> None:
        stats = step.stats
        self.client.receive(step)
        assert self.client.num_unfinished <= MAX_NUM_SEQS + MAX_NUM_QUEUED_REQS
        assert stats.num_running + stats.num_waiting <= MAX_NUM_SEQS + MAX_NUM_QUEUED_REQS
        assert self.client.num_queued_tokens <= MAX_QUEUED_TOKENS
        self.num_preemptions += stats.num_preemptions
        self.num_cache_hits += stats.num_prefix_cache_hits
        for output in step.outputs:
            self.max_queue_s = max(self.max_queue_s, output.queue_s or 0.0)
            if output.seq_id not in self.wanted:
                continue  # aborted
            self.wanted[output.seq_id] -= len(output.token_ids)
            if output.finish_reason is not None:
                assert output.finish_reason == "length"
                assert self.wanted.pop(output.seq_id) == 0


@pytest.mark.parametrize("num_requests", [5000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_traffic_is_served_in_order_without_a_gap_to_its_end(num_requests: int) -> None:
    simulation = Simulation(num_requests, random.Random(num_requests))
    simulation.run()
    assert not simulation.wanted, "a request did not end"
    assert simulation.client.num_unfinished == 0
    assert simulation.max_queue_s < 15, "the whole queue takes 10 s when answers are long"
    assert_pool_is_whole(simulation.engine)
    # It was not too easy.
    share = {
        name: getattr(simulation, f"num_{name}") / num_requests
        for name in ("refused", "aborted", "preemptions", "cache_hits")
    }
    assert 0.05 < share["refused"] < 0.4
    assert share["aborted"] > 0.04
    assert share["preemptions"] > 0.01
    assert share["cache_hits"] > 4, "tokens per request"
