"""Calibration's work, piece by piece: what is done is kept, and how far it is can be told.

No torch here: the command line reads the options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from skipllm_core.skip.profile import DEFAULT_WARMUP_TOKENS

OnProgress = Callable[[str, float, float], None]  # what is being done, work done, work in all

T = TypeVar("T")

DEFAULT_MAX_TOKENS = 128  # per prompt, as in the paper


def no_progress(what: str, done: float, total: float) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user chooses. A cold region that is not given is found."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    warmup_tokens: int = DEFAULT_WARMUP_TOKENS
    cold_start: int | None = None
    cold_end: int | None = None


class Work:
    """Pieces of work by name, each with a result that depends on nothing but the name and `header`.

    With a `path`, results are appended to that file, and taken from it when the same calibration is
    run again: so one that was interrupted goes on where it was. A file with another header is begun
    anew. Work is counted in rows x prompts; `total` is an estimate until the end.
    """

    def __init__(
        self,
        path: Path | None = None,
        header: dict[str, Any] | None = None,
        on_progress: OnProgress = no_progress,
    ) -> None:
        self.total = 0.0
        self._done = 0.0
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

    def say(self, what: str) -> None:
        """Names what the next pieces are for."""
        self._what = what
        self._tell()

    def do(self, name: str, amount: float, compute: Callable[[], T], kind: type[T]) -> T:
        """The result of a piece, computed unless it is known."""
        known = self._results.get(name)
        if known is not None:
            result = msgspec.json.decode(known, type=kind)
        else:
            result = compute()
            if self._path is not None:
                with self._path.open("ab") as file:
                    file.write(msgspec.json.encode([name, result]) + b"\n")
        self._done += amount
        self._tell()
        return result

    def finish(self) -> None:
        """All is done. The file stays until its owner has what it was for."""
        self.total = self._done
        self.say("done")

    def _tell(self) -> None:
        self._on_progress(self._what, self._done, max(self.total, self._done))
