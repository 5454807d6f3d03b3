"""What a run skipped so far, and why: the ledger for people. Needs neither torch nor the run's data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.checkpoint.manifest import DATA_STATE, LEDGER, check_file, committed, read_data_state, read_ledger, read_manifest
from megamm.core.errors import CheckpointError, ConfigError
from megamm.core.names import kind_of_message
from megamm.core.tables import aligned
from megamm.data.ledger import Skipped, merge
from megamm.data.planning.state import DataChange, LoaderState
from megamm.data.planning.stretch import Stretch
from megamm.train.rewinds import decisions
from megamm.train.run_folder import RunFolder
from megamm.train.skipped import read_skipped
from megamm.train.unapplied import read_unapplied, told


@dataclass(frozen=True)
class SkipReport:
    """Every sample that a run skipped, stretches of data that it left out, and updates that were not applied.

    Attributes:
        run: The run folder.
        step: Of the checkpoint whose ledger was read; None where there is none yet.
        entries: By position, each position once.
        steps: Position -> step that lacks the sample, for what was skipped since the run last started.
        changes: Other data or settings that were accepted, oldest first, by that checkpoint; each gave up what its window still had.
        stretches: Data that were left out, by that checkpoint and by what the run decided since.
        unapplied: Lines of `unapplied.jsonl`, by step of data.
    """

    run: Path
    step: int | None
    entries: list[Skipped]
    steps: dict[int, int]
    changes: tuple[DataChange, ...]
    stretches: tuple[Stretch, ...]
    unapplied: list[dict[str, Any]]

    def counts(self) -> list[tuple[str, str, int]]:
        """(dataset, reason, samples), the most frequent first; reasons that differ in names and numbers only count as one."""
        counts = Counter((entry.dataset, reason_class(entry)) for entry in self.entries)
        return [(dataset, reason, num) for (dataset, reason), num in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "run": str(self.run),
            "checkpoint_step": self.step,
            "counts": [{"dataset": dataset, "reason": reason, "samples": num} for dataset, reason, num in self.counts()],
            "changes": [asdict(change) for change in self.changes],
            "stretches": [stretch.to_json() for stretch in self.stretches],
            "unapplied": self.unapplied,
            "entries": [{**entry.to_json(), "step": self.steps.get(entry.position)} for entry in self.entries],
        }

    def lines(self, *, max_entries: int | None = None) -> list[str]:
        """For people: counts, then entries; before them a line for each accepted change, stretch and update.

        Args:
            max_entries: Show the last so many entries; None for all.
        """
        source = f"checkpoint {self.step} and what came since" if self.step is not None else "no checkpoint yet, only what came so far"
        events = [*map(str, self.changes), *map(str, self.stretches), *map(told, self.unapplied)]
        summary = [f"{self.run}: {len(self.entries):,} samples skipped ({source})", *events]
        if not self.entries:
            return summary
        shown = self.entries if max_entries is None else self.entries[-max_entries:] if max_entries else []
        table = [(str(entry.position), entry.dataset, entry.shard, entry.key, entry.reason) for entry in shown]
        hidden = [f"the last {len(shown)} of them (--all shows the others):"] if len(shown) < len(self.entries) else []
        return [
            *summary,
            "",
            *aligned(("dataset", "reason", "samples"), self.counts()),
            "",
            *hidden,
            *aligned(("position", "dataset", "shard", "key", "reason"), table),
        ]


def read_report(run: Path) -> SkipReport:
    """The ledger of a run, which may be going on: its newest good checkpoint's, and what its ranks have noted since.

    Raises:
        ConfigError: The folder holds no run.
        DataError: The state of the data is of another version.
    """
    folder = RunFolder(run)
    if not folder.is_run():
        raise ConfigError(f"{run} holds no run; name a run folder that `megamm pretrain` wrote")
    step, saved, state = _newest_record(folder.checkpoints)
    noted = read_skipped(folder.logs)
    known = state.stretches if state else ()
    return SkipReport(
        run,
        step,
        merge([*saved, *(one.entry for one in noted)]),
        {one.entry.position: one.step for one in noted},
        state.changes if state else (),
        (*known, *(one for one in decisions(run) if one not in known)),
        read_unapplied(run),
    )


def reason_class(entry: Skipped) -> str:
    """A reason without what is different from sample to sample: its key, its shard, its numbers."""
    return kind_of_message(entry.reason, entry.key, entry.shard)


def _newest_record(checkpoints: Path) -> tuple[int | None, list[Skipped], LoaderState | None]:
    """Step, ledger and state of the newest checkpoint whose record of the data is whole; its weights are not read."""
    for step, folder in reversed(committed(checkpoints)):
        try:
            files = read_manifest(folder).files
            for name in (LEDGER, DATA_STATE):
                check_file(folder, name, files[name])
            ledger = [Skipped.from_json(entry) for entry in read_ledger(folder)]
            return step, ledger, LoaderState.from_json(read_data_state(folder))
        except (CheckpointError, OSError):
            # Damaged, or removed by a newer one while we read: an older one is next.
            continue
    return None, [], None
