"""How far a run is: the end of its metrics, however long the rest is and however torn the end."""

import time

import pytest

from megamm.status.progress import Progress, read_progress
from tests.status.conftest import metrics_line


def write(run, *lines: str):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(lines))


def test_nothing_yet(tmp_path):
    assert read_progress(tmp_path) == Progress()
    write(tmp_path, '{"step": 1, "lo')
    assert read_progress(tmp_path) == Progress()


def test_last_line_tells_and_a_torn_one_is_passed_over(tmp_path):
    lines = [metrics_line(step, **{"skipped/texts": step}, mfu=0.4) for step in range(1, 11)]
    write(tmp_path, *lines, metrics_line(11)[:-20])
    progress = read_progress(tmp_path)
    assert (progress.step, progress.num_tokens, progress.num_skipped) == (10, 1000, {"texts": 10})
    assert progress.tokens_per_second == 200.0 and progress.mfu == pytest.approx(0.4) and progress.seconds_a_step == 2.0


def test_time_between_two_starts_is_no_step(tmp_path):
    gone_on = [metrics_line(step, unix_seconds=2e9 + 3.0 * step) for step in range(6, 9)]
    write(tmp_path, *(metrics_line(step) for step in range(1, 6)), *gone_on)
    assert read_progress(tmp_path, began_at_step=5).seconds_a_step == 3.0
    # One line of this start alone: its own seconds.
    assert read_progress(tmp_path, began_at_step=7).seconds_a_step == 0.5


def test_losses_that_are_no_numbers_and_lines_of_other_kinds(tmp_path):
    failed = '{"step": 4, "checkpoint/failed_step": 4, "checkpoint/failures_in_a_row": 2}\n'
    write(tmp_path, metrics_line(3), '{"step": 3, "held_out/loss": 2.5}\n', metrics_line(4, loss="nan"), failed, "[1]\n", "7\n")
    progress = read_progress(tmp_path)
    assert (progress.loss, progress.held_out_loss, progress.num_failed_saves) == ("nan", 2.5, 2)
    write(tmp_path, metrics_line(4), failed, '{"step": 5, "checkpoint/step": 5, "unix_seconds": 7.5}\n')
    assert read_progress(tmp_path).num_failed_saves == 0 and read_progress(tmp_path).written_at == 7.5


def test_a_gigabyte_of_metrics_is_not_read(tmp_path):
    write(tmp_path, metrics_line(1))
    with (tmp_path / "metrics.jsonl").open("r+b") as file:
        file.seek(1 << 30)
        file.write(b"\n" + metrics_line(2).encode())
    began = time.monotonic()
    assert read_progress(tmp_path).step == 2
    # Reading it takes most of a second on any disk, its end a millisecond.
    assert time.monotonic() - began < 0.3
