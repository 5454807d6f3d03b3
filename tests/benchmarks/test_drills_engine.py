"""Drills with the engine: their judges notice what is not as it was, and a short form of each loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.drills.engine import DRILLS
from benchmarks.drills.engine.attempts import outcome
from benchmarks.drills.engine.equality import Unbroken, left_in, same_state
from benchmarks.drills.engine.jobs import Stuck, in_sessions, wait_until
from benchmarks.drills.engine.resources import Growth, Holding
from megamm.checkpoint.manifest import rank_file, step_folder
from megamm.core.errors import CheckpointError
from megamm.core.json_lines import read_json_lines
from tests.support.checkpoints import some_tensors, write_checkpoint

LAST_STEP = 4


def write_run(run):
    """Four steps with their numbers, places in the data, and a checkpoint of every second one."""
    run.mkdir()
    lines = [
        {"step": step, "sample_keys": f"keys {step}", "tokens": 10, "supervised_tokens": 4, "skipped_samples": step, "loss": 1 / step}
        for step in range(1, LAST_STEP + 1)
    ]
    write_lines(run / "metrics.jsonl", [*lines, {"step": LAST_STEP, "checkpoint/step": 2}])
    places = [{"step": 0, "row": 0, "scale": {"world_size": 2}}, {"step": 2, "row": 2}]
    write_lines(run / "data_positions.jsonl", places)
    for step in (2, 4):
        write_checkpoint(run / "checkpoints", step, some_tensors())
    return run


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def pair(tmp_path):
    """An unbroken run and one that equals it."""
    run = write_run(tmp_path / "unbroken")
    lines = {line["step"]: line for line in read_json_lines(run / "metrics.jsonl") if "loss" in line}
    return Unbroken(run, lines, {2: {"step": 2, "row": 2}, 4: {"step": 4, "row": 4}}), write_run(tmp_path / "broken")


def change_line(name, number, **values):
    def change(run):
        lines = read_json_lines(run / name)
        lines[number] |= values
        write_lines(run / name, lines)

    return change


def repeat_a_step(run):
    lines = read_json_lines(run / "metrics.jsonl")
    write_lines(run / "metrics.jsonl", [*lines[:3], *lines[2:]])


def lose_a_step(run):
    write_lines(run / "metrics.jsonl", read_json_lines(run / "metrics.jsonl")[1:])


def train_other_weights(run):
    (run / "checkpoints" / step_folder(2)).rename(run / "gone")
    tensors = some_tensors()
    tensors["a.weight"][1, 2] += 1e-6
    write_checkpoint(run / "checkpoints", 2, tensors)


def flip_a_bit(run):
    path = run / "checkpoints" / step_folder(2) / rank_file(1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_the_newest(run):
    (run / "checkpoints" / step_folder(4)).rename(run / "gone")


SPOILT = {
    "other samples": (change_line("metrics.jsonl", 2, sample_keys="others"), "step 3: sample_keys is others"),
    "another loss": (change_line("metrics.jsonl", 2, loss=0.5), "step 3: loss is 0.5"),
    "another place": (change_line("data_positions.jsonl", 1, row=3), "the data stand elsewhere after step 2"),
    "a step twice": (repeat_a_step, "holds 5 steps"),
    "a step less": (lose_a_step, "holds 3 steps"),
    "other weights": (train_other_weights, "differs from the unbroken one in rank_00000.safetensors: weight/a.weight"),
    "damage": (flip_a_bit, "is damaged"),
    "no last checkpoint": (lose_the_newest, "the newest of 1 checkpoints is not of step 4"),
}


def test_an_equal_run_is_equal(pair):
    unbroken, run = pair
    assert unbroken.problems(run, last_step=LAST_STEP) == []
    assert left_in(run / "checkpoints") == []
    (run / "checkpoints" / ".step_00000006.1-1.tmp").mkdir()
    assert left_in(run / "checkpoints") == [".step_00000006.1-1.tmp"]


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_equal_is_said(pair, name):
    unbroken, run = pair
    spoil, message = SPOILT[name]
    spoil(run)
    (problem,) = unbroken.problems(run, last_step=LAST_STEP)
    assert message in problem


def test_at_another_number_of_ranks_losses_may_differ_and_samples_may_not(pair):
    unbroken, run = pair
    SPOILT["another loss"][0](run)
    train_other_weights(run)
    assert unbroken.problems(run, last_step=LAST_STEP, bit_for_bit=False) == []
    SPOILT["other samples"][0](run)
    assert len(unbroken.problems(run, last_step=LAST_STEP, bit_for_bit=False)) == 1


def test_states_are_compared_tensor_by_tensor(tmp_path):
    tensors = some_tensors()
    two, three = (write_checkpoint(tmp_path / str(num), 2, tensors, num_ranks=num) for num in (2, 3))
    assert same_state(two, three) == []
    other = write_checkpoint(tmp_path / "other", 2, {**tensors, "b.scale": torch.zeros(1)}, num_ranks=3)
    (problem,) = same_state(two, other)
    assert "differ in 1 tensors: ['weight/b.scale']" in problem


def test_growth_is_told_from_what_is_loaded_once():
    flat = [Holding(float(second), 500 << 20, 30, 64 << 20, 9) for second in range(40)]
    loading = [Holding(float(second), second << 20, second, 0, 1) for second in range(10)]
    assert Growth.over([*loading, *flat[:30]]).problems(max_resident_mib=1.0) == []
    leaking = [Holding(float(second), (500 + second) << 20, 30 + second, second << 20, 9 + second) for second in range(40)]
    growth = Growth.over(leaking)
    assert growth.resident_mib == growth.num_files == growth.shared_mib == growth.num_threads == 20
    assert len(growth.problems(max_resident_mib=19.0)) == 4
    assert len(growth.problems(max_resident_mib=20.0)) == 3


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="anonymous shared memory of Linux")
def test_files_and_shared_memory_of_processes_are_seen():
    before = Holding.of([os.getpid()])
    descriptor = os.memfd_create("seen")
    os.ftruncate(descriptor, 1 << 20)
    other = os.dup(descriptor)
    during = Holding.of([os.getpid()])
    for one in (descriptor, other):
        os.close(one)
    assert before is not None and during is not None
    assert (during.num_files - before.num_files, during.shared_bytes - before.shared_bytes) == (2, 1 << 20)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Holding.of([os.getpid(), gone.pid]) is None


def test_processes_that_outlive_a_job_are_found():
    program = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0); print()"
    job = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert job.stdin is not None and job.stdout is not None
    job.stdout.readline()
    wait_until(lambda: job.poll() is not None, "the job did not end")
    assert len(in_sessions({job.pid})) == 1
    job.stdin.write(b"\n")
    job.stdin.close()
    wait_until(lambda: not in_sessions({job.pid}), "its child did not end")
    job.stdout.close()


def test_what_a_try_raises_is_its_loss_and_mistakes_of_the_drill_are_not():
    def stuck():
        raise Stuck("it went on within 3 s")

    def refused():
        raise CheckpointError("checkpoint x is damaged")

    def mistaken():
        raise KeyError("planted")

    assert outcome(lambda: []) == ""
    assert outcome(lambda: ["a", "b"]) == "a; b"
    assert outcome(stuck) == "Stuck: it went on within 3 s"
    assert outcome(refused) == "CheckpointError: checkpoint x is damaged"
    with pytest.raises(KeyError):
        outcome(mistaken)


@pytest.mark.integration
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("drill", DRILLS, ids=[drill.fault.removeprefix("with the engine: ") for drill in DRILLS])
def test_a_short_form_loses_nothing(drill, tmp_path):
    tally = drill.run("quick", tmp_path)
    if not tally.tries:
        pytest.skip(tally.note)
    assert not tally.lost, tally.note
