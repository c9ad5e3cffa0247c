"""What crosses the bridge between a client and its engine: msgpack on the wire, never pickle."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from skipllm_core.types import EngineInfo, SamplingParams, StepOutput


class Add(msgspec.Struct, tag=True, frozen=True):
    seq_id: int
    prompt_ids: list[int]
    params: SamplingParams
    arrival_s: float  # on time.monotonic's clock, which the machine's processes share


class Abort(msgspec.Struct, tag=True, frozen=True):
    seq_id: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine could not be built."""

    reason: str


class Stepped(msgspec.Struct, tag=True, frozen=True):
    output: StepOutput


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """An idle engine's sign of life; a busy one's are its steps."""


Command: TypeAlias = Add | Abort
Message: TypeAlias = Ready | Failed | Stepped | Heartbeat
