"""The table of Slurm events: what was not expected stays visible, and misses its goal."""

import json
from pathlib import Path

import pytest

from benchmarks.slurm_events import EVENTS, LOSS_TOLERANCE, markdown, rows_of, write
from benchmarks.slurm_strikes import Seen

FIRST = EVENTS[0]
GOOD = Seen(FIRST.expected, 12.3, 2, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("seen", "missed"),
    [
        (GOOD, []),
        (Seen("TooSlow: step 6: not within 300 s"), ["ends as expected"]),
        (Seen(FIRST.expected, 12.3, 2, 9, 0, 0.0), ["samples lost or repeated"]),
        (Seen(FIRST.expected, 12.3, 2, 0, 1, 0.0), ["weights that differ from the unbroken run's"]),
        (Seen(FIRST.expected, 12.3, 2, 0, None, 2 * LOSS_TOLERANCE), ["largest difference of a step's loss"]),
    ],
)
def test_only_what_went_wrong_misses_its_goal(seen: Seen, missed: list[str]):
    assert [row.row for row in rows_of({FIRST.name: seen}) if row.holds is False] == [f"{FIRST.name}: {what}" for what in missed]


def test_the_table_says_what_was_seen_instead(tmp_path: Path):
    seen = {FIRST.name: GOOD, EVENTS[1].name: Seen("FAILED, 0 restarts")}
    assert "| as expected | 12 s | 2 | 0 | weights bit-equal |" in markdown(seen)
    path = write(seen, "a command", folder=tmp_path)
    assert "| **FAILED, 0 restarts** | – | – | – | – |" in path.with_suffix(".md").read_text()
    assert json.loads(path.read_text())["events"][FIRST.name]["resume_seconds"] == 12.3
