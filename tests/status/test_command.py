"""`megamm status` as it is called: on a login node without torch, for programs, again and again, and on a real run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megamm.config import to_dict
from megamm.status.run_status import read_status
from tests.status.conftest import metrics_line
from tests.support.login_node import login_node
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of a login node."""
    return login_node(tmp_path / "blocked")


def megamm(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megamm.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_it_needs_no_torch_and_writes_nothing(run, owned, without_torch):
    (run / "metrics.jsonl").write_text(metrics_line(7))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if ".lock" not in path.parts}
    answer = megamm("status", str(run), env=without_torch)
    assert answer.returncode == 0 and "7 of 2,000" in answer.stdout, answer.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if ".lock" not in path.parts}


def test_json_is_one_line_a_run(run, without_torch):
    (run / "metrics.jsonl").write_text(metrics_line(7, loss="nan"))
    answer = megamm("status", "--json", str(run), str(run.parent), env=without_torch)
    (line,) = answer.stdout.splitlines()
    told = json.loads(line)
    assert (told["state"], told["step"], told["num_steps"], told["loss"], told["num_tokens"]) == ("idle", 7, 2000, "nan", 700)


def test_what_is_no_run_is_one_line(tmp_path):
    answer = megamm("status", str(tmp_path))
    assert answer.returncode == 1 and answer.stderr.startswith(f"megamm: {tmp_path} holds no run") and len(answer.stderr.splitlines()) == 1


def test_watching_goes_on_until_it_is_interrupted(run):
    command = [sys.executable, "-m", "megamm.cli", "status", "--watch", "1", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        seen = [line for line, _ in zip(watching.stdout, range(12), strict=False)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(60) == 130
    assert sum("idle" in line for line in seen) >= 2


@pytest.mark.integration
@pytest.mark.timeout(900)
def test_a_real_run_killed_and_gone_on_with(tmp_path):
    make_data(tmp_path / "data")
    write_recipe(tmp_path / "small.toml", to_dict(recipe_over(tmp_path / "data", "--checkpoint.every=2", "--train.steps=400")))
    run = tmp_path / "runs" / "real"
    command = [sys.executable, "-m", "megamm.cli", "pretrain", "small.toml", "--run", str(run)]

    def status() -> dict:
        (one,) = read_status([run])
        return one.to_json()

    def wait_until(holds, process) -> dict:
        end = time.monotonic() + 400
        while not (holds(told := status())):
            assert process.poll() is None and time.monotonic() < end, told
            time.sleep(0.2)
        return told

    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as first:
        told = wait_until(lambda one: one["checkpoint"] and one["checkpoint"]["step"] >= 2 and one["ranks"], first)
        assert told["state"] == "running" and told["num_ranks"] == 1 and told["seconds_left"] > 0
        assert told["step"] >= 2 and told["num_tokens"] > 0 and [rank["pid"] for rank in told["ranks"]] == [first.pid]
        psutil.Process(first.pid).kill()
        first.wait(60)
    told = status()
    assert told["state"] == "dead" and "its process is gone" in told["why"] and told["seconds_left"] is None
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as second:
        wait_until(lambda one: one["state"] == "running" and one["num_restarts"] == 1, second)
        second.send_signal(signal.SIGTERM)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 0, errors[-2000:]
    told = status()
    assert told["state"] == "interrupted" and "SIGTERM" in told["why"]
    assert told["checkpoint"]["step"] == told["step"] == told["interrupted"]["step"] and told["ranks"] == []
    answer = megamm("status", str(run.parent))
    assert "interrupted (after step" in answer.stdout and answer.returncode == 0, answer.stderr
