"""What ends real runs of two ranks, and what they leave behind: no rank hangs, and somebody can read why."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megamm.checkpoint.manifest import verify
from megamm.config import to_dict
from megamm.core.json_lines import read_json_lines
from megamm.telemetry.failures import last_failure, read_failures
from megamm.telemetry.heartbeat import read_beats
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = CHECKOUT / "tests" / "support" / "faulty_run.py"

pytestmark = [pytest.mark.distributed, pytest.mark.integration]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and a recipe with more steps than anybody waits for."""
    folder = tmp_path_factory.mktemp("endings")
    make_data(folder / "data")
    write_recipe(folder / "recipe.toml", to_dict(recipe_over(folder / "data", "--batch.micro_rows=1", "--train.steps=4000")))
    return folder


class Running:
    """Two ranks with one fault; a context manager that leaves no process. `errors` is what they said."""

    def __init__(self, folder: Path, run: str, fault: str, *words: str):
        self.run = folder / run
        self._errors = folder / f"{run}.txt"
        program = [sys.executable, str(PROGRAM), fault, "pretrain", "recipe.toml", "--run", run, *words]
        launcher = [str(CHECKOUT / "launchers" / "local.sh"), "2", *program]
        with self._errors.open("w") as file:
            self.launcher = subprocess.Popen(launcher, cwd=folder, stdout=subprocess.DEVNULL, stderr=file)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        left = self.ranks()
        for process in [*left.values(), self.launcher]:
            process.kill()
        psutil.wait_procs(list(left.values()), timeout=60)
        self.launcher.wait(timeout=60)

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks that live."""
        if self.launcher.poll() is not None:
            return {}
        found = {}
        for one in psutil.Process(self.launcher.pid).children(recursive=True):
            # One that ends meanwhile is none that lives.
            with contextlib.suppress(psutil.Error):
                if PROGRAM.name in " ".join(one.cmdline()):
                    found[int(one.environ()["RANK"])] = one
        return found

    def wait_for(self, condition: Callable[[], object], seconds: float = 150.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.launcher.poll() is None and time.monotonic() < end, self.errors[-4000:]
            time.sleep(0.05)

    def end(self) -> int:
        """Wait for the launcher and return its code: a run that hangs fails here."""
        code = self.launcher.wait(timeout=200)
        assert not self.ranks()
        return code

    def num_steps(self) -> int:
        return len([line for line in read_json_lines(self.run / "metrics.jsonl") if "loss" in line])


def test_a_rank_that_is_stopped_is_named_by_the_other(folder):
    with Running(folder, "stopped", "none", "--telemetry.stall_seconds=4") as running:
        running.wait_for(lambda: running.num_steps() > 1 and len(read_beats(running.run, 1)) == 2)
        running.ranks()[1].send_signal(signal.SIGSTOP)
        assert running.end() != 0
    record = last_failure(running.run)
    assert record and record["kind"] == "Stall" and "rank 1 is silent" in record["message"]
    zero, one = record["ranks"]
    assert zero["is_stalled"] and not zero["is_silent"] and one["is_silent"] and not one["is_stalled"]
    stacks = (running.run / "logs" / "stall.rank_00000.txt").read_text()
    assert "most recent call first" in stacks and "loop.py" in stacks
    assert "rank 1 is silent" in running.errors and "silent for" in running.errors


def test_a_rank_that_is_stuck_reading_is_named_with_its_sample(folder):
    with Running(folder, "stuck", "hang_reading", "--telemetry.stall_seconds=4") as running:
        assert running.end() != 0
    record = last_failure(running.run)
    assert record and record["kind"] == "Stall" and record["phase"] == "data"
    zero, one = record["ranks"]
    # The one waits for its data, the other for the one: it is a collective ahead.
    assert "__next__ (data.loading.loader" in one["doing"] and "all_reduce" in zero["doing"] and "count (train.step" in zero["doing"]
    assert one["num_collectives"] == zero["num_collectives"] - 1
    assert one["shard"] == "train-00000.tar" and one["key"].partition("/")[0] in ("pictures", "sounds", "both", "texts") and not zero["key"]
    assert (running.run / "logs" / "stall.rank_00001.txt").is_file()


def test_ranks_in_different_collectives_do_not_wait_for_ever(folder):
    with Running(folder, "skipping", "skip_collective", "--telemetry.stall_seconds=4") as running:
        assert running.end() != 0
    record = last_failure(running.run)
    assert record
    # Where the sizes do not fit gloo may say so first; where it waits, the watch does.
    if record["kind"] == "Stall":
        assert "rank 0 in data of step 3" in record["message"] and "rank 1 in train of step 3" in record["message"]
    assert record["step"] == 3


def test_what_ends_a_rank_is_recorded_with_its_samples_and_ends_the_other(folder):
    with Running(folder, "memory", "run_out_of_memory") as running:
        assert running.end() == 1
    record = last_failure(running.run)
    assert record and (record["kind"], record["rank"], record["step"], record["start"]) == ("OutOfMemoryError", 1, 3, 1)
    assert "out of memory" in record["message"] and "run_out_of_memory" not in record["phase"] and "Traceback" in record["traceback"]
    trace = subprocess.run(
        [sys.executable, "-m", "megamm.cli", "data", "trace", "memory", "--step", "3", "--rank", "1", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    planned = [(one["dataset"], one["shard"], one["key"], one["micro_step"], one["row"]) for one in json.loads(trace.stdout)["samples"]]
    assert planned == [tuple(one[name] for name in ("dataset", "shard", "key", "micro_step", "row")) for one in record["samples"]]
    others = [one for one in read_failures(running.run) if one["rank"] == 0]
    assert all(one["lost_peer"] for one in others)
    assert "OutOfMemoryError" in running.errors and running.errors.count("Traceback") == 1


def test_ten_signals_during_the_last_save_break_nothing(folder):
    """The stop is `--max-seconds`; what comes while its checkpoint is written slowly changes neither the save nor the reason."""
    with Running(folder, "signals", "write_slowly", "--max-seconds=1") as running:
        running.wait_for(lambda: list((running.run / "checkpoints").glob(".step_*")))
        ranks = running.ranks()
        for number in range(10):
            for process in ranks.values():
                os.kill(process.pid, (signal.SIGTERM, signal.SIGUSR1)[number % 2])
            time.sleep(0.05)
        assert not (running.run / "INTERRUPTED").exists(), "the signals came after the save"
        assert running.end() == 0, running.errors[-4000:]
    marker = json.loads((running.run / "INTERRUPTED").read_text())
    assert marker == {"step": running.num_steps(), "reason": "max_seconds", "requeue": False}
    (checkpoint,) = (running.run / "checkpoints").glob("step_*")
    assert verify(checkpoint).step == marker["step"]
    assert not (running.run / "heartbeats").exists() and not (running.run / "errors").exists()
