"""Calibration's work, piece by piece: what is done is kept, and how far it is can be told.

No torch here: the command line reads the options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from skipllm_core.skip.profile import DEFAULT_WARMUP_TOKENS, MEASURED_POLICIES
from skipllm_core.types import SkipPolicyName

OnProgress = Callable[[str, float, float], None]  # what is being done, work done, work in all

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 128  # per prompt, as in the paper
GENERATED_TOKEN = 3.0  # the work of one, where one that passes is 1


def no_progress(what: str, done: float, total: float) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user chooses. A cold region that is not given is found."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    warmup_tokens: int = DEFAULT_WARMUP_TOKENS
    cold_start: int | None = None
    cold_end: int | None = None
    policies: tuple[SkipPolicyName, ...] = MEASURED_POLICIES


class Work:
    """Pieces of work by name, each with a result that depends on nothing but the name and `header`.

    With a `path`, results are appended to that file, and taken from it when the same calibration is
    run again: so one that was interrupted goes on where it was. A file with another header is begun
    anew.

    How far it is is told in tokens that passed through the model. They are planned by stage, and
    planned anew as more is known; what is done counts as done, so the share never falls back much.
    """

    def __init__(
        self,
        path: Path | None = None,
        header: dict[str, Any] | None = None,
        on_progress: OnProgress = no_progress,
    ) -> None:
        self._planned: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._stage = ""
        self._what = ""
        self._path = path
        self._on_progress = on_progress
        self._results: dict[str, msgspec.Raw] = {}
        if path is not None:
            self._begin(path, msgspec.json.encode(header))

    def _begin(self, path: Path, header: bytes) -> None:
        data = path.read_bytes() if path.exists() else b""
        whole, _, _ = data.rpartition(b"\n")  # what stands behind was cut off
        first, *lines = whole.split(b"\n")
        if first != header:
            first, lines = header, []
        for line in lines:
            name, result = msgspec.json.decode(line, type=tuple[str, msgspec.Raw])
            self._results[name] = result
        path.write_bytes(b"".join(line + b"\n" for line in (first, *lines)))

    @property
    def num_kept(self) -> int:
        """Pieces whose results the file has."""
        return len(self._results)

    # Pieces --------------------------------------------------------------------------------------

    def do(self, name: str, amount: float, compute: Callable[[], T], kind: type[T]) -> T:
        """The result of a piece, computed unless it is known. What `compute` advances by itself is
        part of the amount."""
        before = self._done.get(self._stage, 0.0)
        result = self.known(name, kind)
        if result is None:
            result = compute()
            self.keep(name, result)
        self._done[self._stage] = before
        self.advance(amount)
        return result

    def known(self, name: str, kind: type[T]) -> T | None:
        result = self._results.get(name)
        return None if result is None else msgspec.json.decode(result, type=kind)

    def keep(self, name: str, result: object) -> None:
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode([name, result]) + b"\n")

    # Progress ------------------------------------------------------------------------------------

    def plan(self, stage: str, amount: float) -> None:
        """How much a stage is, as far as is known."""
        self._planned[stage] = amount

    def begin(self, stage: str, what: str) -> None:
        """The next pieces are of this stage; `what` names them to the user."""
        self._stage = stage
        self.say(what)

    def say(self, what: str) -> None:
        self._what = what
        self._tell()

    def advance(self, amount: float) -> None:
        self._done[self._stage] = self._done.get(self._stage, 0.0) + amount
        self._tell()

    def end(self) -> None:
        """The stage is done, however much it was."""
        self._planned[self._stage] = self._done.get(self._stage, 0.0)

    def finish(self) -> None:
        """All is done. The file stays until its owner has what it was for."""
        self._planned = dict(self._done)
        self.say("done")

    def _tell(self) -> None:
        done = sum(self._done.values())
        stages = self._planned.keys() | self._done.keys()
        total = sum(max(self._planned.get(s, 0.0), self._done.get(s, 0.0)) for s in stages)
        self._on_progress(self._what, done, max(total, 1.0))
