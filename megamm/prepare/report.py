"""What a preparation ends with: files beside the shards, and lines for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.core.files import write_json, write_text
from megamm.prepare.shard import Finished


@dataclass(frozen=True)
class SplitReport:
    """One split after a command.

    Attributes:
        output: Folder of the shards.
        split: Its name.
        finished: Its finished shards of all parts, in order.
        num_planned: Shards of the plan.
        notes: What of the input is no record.
    """

    output: Path
    split: str
    finished: Sequence[Finished]
    num_planned: int
    notes: Sequence[str] = ()

    @property
    def is_complete(self) -> bool:
        """Whether all parts have finished."""
        return len(self.finished) == self.num_planned

    @property
    def num_samples(self) -> int:
        """Samples of the finished shards."""
        return sum(one.shard.num_samples for one in self.finished if one.shard)

    @property
    def num_skipped(self) -> int:
        """Records of the finished shards that gave no sample."""
        return sum(one.num_skipped for one in self.finished)

    @property
    def skipped_path(self) -> Path:
        """The file of omissions."""
        return self.output / f"{self.split}-skipped.jsonl"

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write `SPLIT-skipped.jsonl` (removed where nothing was left out), and `SPLIT-report.json` once the split is complete.

        Equal for every way of getting there: any number of workers, parts and restarts.

        Args:
            facts: What the split is made from.
        """
        lines = [{"key": "", "omitted": "input", "reason": note} for note in self.notes]
        lines += [omission.to_json() for one in self.finished for omission in one.omissions]
        if lines:
            write_text(self.skipped_path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        else:
            self.skipped_path.unlink(missing_ok=True)
        if self.is_complete:
            counts = {"num_samples": self.num_samples, "num_skipped": self.num_skipped, "num_omitted_parts": self._num_parts}
            shards = [{"name": one.name, "num_samples": 0, "num_bytes": 0, "digest": ""} for one in self.finished]
            for entry, one in zip(shards, self.finished, strict=True):
                if one.shard:
                    entry |= {"num_samples": one.shard.num_samples, "num_bytes": one.shard.num_bytes, "digest": one.shard.digest}
            write_json(self.output / f"{self.split}-report.json", {**counts, "shards": shards, "made_from": dict(facts)})

    def lines(self) -> list[str]:
        """The report for people."""
        tars = [one.shard for one in self.finished if one.shard]
        size = sum(shard.num_bytes for shard in tars) / 1e6
        shards = "1 shard" if len(tars) == 1 else f"{len(tars)} shards"
        line = f"{self.output / self.split}-*.tar: {self.num_samples:,} samples in {shards}, {size:,.1f} MB"
        if self.num_skipped or self._num_parts or self.notes:
            counts = [(self.num_skipped, "samples skipped"), (self._num_parts, "parts left out"), (len(self.notes), "inputs not used")]
            line += f"; {', '.join(f'{count:,} {what}' for count, what in counts if count)}, see {self.skipped_path.name}"
        lines = [line]
        if missing := self.num_planned - len(self.finished):
            lines.append(f"{self.output / self.split}-*.tar: {missing} of {self.num_planned} shards are left to other parts")
        return lines

    @property
    def _num_parts(self) -> int:
        return sum(not omission.is_sample for one in self.finished for omission in one.omissions)
