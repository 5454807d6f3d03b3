"""One fault: what lies on disk, what is done to it and when, and what a reader must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Files = Mapping[str, bytes]
"""Members of one sample by suffix."""

Verdict = Literal["refused", "in ledger", "recovered", "unharmed", "lost silently", "crashed"]


@dataclass(frozen=True)
class Case:
    """One try. What is not said is as in a healthy run.

    Attributes:
        name: Of the case inside its class.
        indexed: The shard when it was indexed and its lengths planned.
        truth: Key -> members that the writer of the shard meant.
        found: The shard when training opens it; None for `indexed`.
        rotten: Keys whose content no reader can use: they must be reported and never delivered.
        loose: Keys that may be delivered as they were read, or reported: nothing tells what they should have been.
        planned: Whether the lengths were planned before the damage.
        file_name: Of the shard.
        shards: What the recipe calls the shard; None for `file_name`.
        spoil: Damages what lies beside the shard, after all sidecars were written; receives the shard.
        during: Damages the shard once training has opened it; receives the shard.
        trouble: What goes wrong while reading, see `reading.Trouble`.
        server: The shard is read from a web server with these manners, see `serving.Manners`.
        settings: Of `Data`, in place of those of all tries.
        around: What happens besides while the loader runs.
        passes: True for a trouble that passes: delivering everything is then recovering.
    """

    name: str
    indexed: bytes
    truth: Mapping[str, Files]
    found: bytes | None = None
    rotten: frozenset[str] = frozenset()
    loose: frozenset[str] = frozenset()
    planned: bool = True
    file_name: str = "train-00000.tar"
    shards: str | None = None
    spoil: Callable[[Path], None] | None = None
    during: Callable[[Path], None] | None = None
    trouble: Any = None
    server: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    passes: bool = False


@dataclass
class Tally:
    """What became of the tries of one class.

    Attributes:
        counts: Verdict -> tries.
        executed: Tries in which code out of the data ran.
        peak_bytes: Memory at the highest, above what a healthy run takes.
        seconds: That all tries took.
        examples: Verdict -> case and message of the first try of that kind.
    """

    counts: dict[str, int] = field(default_factory=dict)
    executed: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, verdict: Verdict, message: str) -> None:
        """Count one try."""
        self.counts[verdict] = self.counts.get(verdict, 0) + 1
        self.examples.setdefault(verdict, f"{case}: {message}"[:300])

    @property
    def tries(self) -> int:
        """All tries."""
        return sum(self.counts.values())

    @property
    def detected(self) -> int:
        """Tries that were refused with a named error, or whose samples are in the ledger with their reason."""
        return self.counts.get("refused", 0) + self.counts.get("in ledger", 0)
