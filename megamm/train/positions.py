"""Which place of the data plan the steps began at, kept with the run, so that any step is found without replaying the run.

`data_positions.jsonl` has a line whenever the run starts or resumes, which also says how rows are dealt to ranks from there
on, and one every few steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamm.core.errors import DataError
from megamm.core.files import digest_text
from megamm.core.json_lines import JsonLines, cut_back, read_json_lines
from megamm.data.planning.state import LoaderState

FILE = "data_positions.jsonl"
EVERY = 10
"""Steps between lines: at most this many are planned again to find one, and a table of a million steps stays below 100 MB."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How rows are dealt: to how many ranks, how many a micro-step, and in how many micro-steps."""

    world_size: int
    micro_rows: int
    accumulation: int


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the table: where the data plan stood after some step (for `LoaderState.from_position_json`), and the scale."""

    position: dict[str, Any]
    scale: Scale


class PositionLog:
    """Writes the table; rank 0 holds one. State: the open file.

    Args:
        folder: The run folder.
        start: Where the run begins or resumes; what an earlier attempt wrote from there on is dropped.
        scale: How its rows are dealt from here on.
    """

    def __init__(self, folder: Path, start: LoaderState, scale: Scale):
        path = folder / FILE
        # The step itself too: this attempt has its own scale, and may have its own weights.
        cut_back(path, start.step - 1)
        self._lines = JsonLines(path)
        self._lines.write({**start.position_json(), "scale": asdict(scale)})

    def write(self, state: LoaderState) -> None:
        """Note the place after a step, where one is due."""
        if state.step % EVERY == 0:
            self._lines.write(state.position_json())

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def sample_keys_digest(keys: Iterable[str]) -> str:
    """Digest of the ordered `dataset/key` of a global batch: equal for equal batches, short enough for a log."""
    return digest_text("\n".join(keys))


def find_place(run: Path, step: int, *, of_data: bool = False) -> Place:
    """The last place before a step that the run's table knows.

    Args:
        run: The run folder.
        step: Number of a step, from 1.
        of_data: It is counted over the whole plan, what the run left out included.

    Raises:
        DataError: There is no table, or it begins later.
    """
    lines = read_json_lines(run / FILE)
    if not lines:
        raise DataError(f"{run} has no {FILE}; name a run folder that `megamm pretrain` wrote")
    before = [line for line in lines if line["num_steps" if of_data else "step"] < step]
    if not before:
        raise DataError(
            f"{run / FILE} begins after step {lines[0]['step']}: ask for a later step, or ask the run that this one went on from"
        )
    scale = next(line["scale"] for line in reversed(before) if "scale" in line)
    return Place({name: value for name, value in before[-1].items() if name != "scale"}, Scale(**scale))
