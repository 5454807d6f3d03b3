"""Real runs of two ranks that somebody stops, keeps samples out of, or gives other data: nothing else about their samples changes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from megamm.checkpoint.manifest import read_data_state, read_ledger
from megamm.config import to_dict
from megamm.core.json_lines import read_json_lines
from megamm.data.shards.index import load_index, write_index
from megamm.train.data_report import read_report
from megamm.train.trace import trace_step
from tests.support.recipes import write_recipe
from tests.support.runs import corrupt_pictures, make_data, recipe_over
from tests.support.shards import as_files, text_document, write_tar
from tests.support.signals import hear_interrupts

CHECKOUT = Path(__file__).resolve().parents[2]
NUM_STEPS = 12

pytestmark = [pytest.mark.distributed, pytest.mark.integration]


def command(num_ranks: int, run: str, *words: str) -> list[str]:
    return [str(CHECKOUT / "launchers" / "local.sh"), str(num_ranks), "megamm", "pretrain", "recipe.toml", "--run", run, *words]


def pretrain(folder: Path, num_ranks: int, run: str, *words: str) -> None:
    result = subprocess.run(command(num_ranks, run, *words), cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]


def refused(folder: Path, run: str, *words: str) -> str:
    """The one line of a start that is refused."""
    result = subprocess.run(command(1, run, *words), cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-4000:]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("megamm: ")]
    return line


def digests(run: Path) -> dict[int, str]:
    """Step -> digest of its sample keys."""
    return {line["step"]: line["sample_keys"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line}


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data with rotten pictures, a recipe, and an unbroken run of two ranks that keeps its checkpoint of step 6."""
    folder = tmp_path_factory.mktemp("tooling")
    make_data(folder / "data")
    corrupt_pictures(folder / "data" / "pictures" / "train-00000.tar")
    write_recipe(folder / "recipe.toml", to_dict(recipe_over(folder / "data", "--batch.micro_rows=1", "--checkpoint.every=6")))
    pretrain(folder, 2, "unbroken")
    return folder


def test_every_step_of_a_run_is_traced(folder):
    run = folder / "unbroken"
    ledger = read_ledger(last_checkpoint(run))
    assert len(ledger) > 3
    traced = []
    for step in range(1, NUM_STEPS + 1):
        trace = trace_step(run, step)
        assert trace.sample_keys == digests(run)[step]
        traced += [one for one in trace.samples if one.skipped]
    assert {(one.position, one.key, one.skipped) for one in traced} == {(one["position"], one["key"], one["reason"]) for one in ledger}
    counted = [line for line in read_json_lines(run / "metrics.jsonl") if "loss" in line][-1]
    assert counted["skipped/pictures"] == counted["skipped_samples"] == len(ledger)


def test_data_that_fail_on_one_rank_end_all_ranks_with_one_line(folder):
    words = command(2, "rotten", "--data.max_skipped_share", "0")
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-4000:]
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("megamm")]
    assert "data.max_skipped_share is 0" in line and "pictures/" in line and "of 2, step " in line
    assert read_json_lines(folder / "rotten" / "data_positions.jsonl")[0]["step"] == 0
    # What ended the run is in its report, at the step that did not come.
    (named,) = re.findall(r"the last is pictures/(\S+) in", line)
    (step,) = map(int, re.findall(r"of 2, step (\d+)\)", line))
    report = read_report(folder / "rotten")
    assert step in [report.steps[entry.position] for entry in report.entries if entry.key == named]


def test_sigterm_to_one_rank_commits_and_the_resumed_run_has_the_same_samples(folder):
    run = folder / "stopped"
    launcher = subprocess.Popen(command(2, "stopped"), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(read_json_lines(run / "metrics.jsonl")) >= 2, launcher)
        second = next(one for one in ranks_of(launcher) if one.environ()["RANK"] == "1")
        os.kill(second.pid, signal.SIGTERM)
        _, errors = launcher.communicate(timeout=120)
    finally:
        for one in ranks_of(launcher):
            one.kill()
        launcher.kill()
    assert launcher.returncode == 0, errors[-4000:]
    marker = json.loads((run / "INTERRUPTED").read_text())
    assert marker["reason"] == "SIGTERM" and 2 <= marker["step"] < NUM_STEPS
    assert last_checkpoint(run).name == f"step_{marker['step']:08d}" and not (run / "DONE").exists()
    pretrain(folder, 2, "stopped")
    assert (run / "DONE").is_file() and not (run / "INTERRUPTED").exists()
    assert digests(run) == digests(folder / "unbroken") and set(digests(run)) == set(range(1, NUM_STEPS + 1))
    assert read_ledger(last_checkpoint(run)) == read_ledger(last_checkpoint(folder / "unbroken"))
    assert trace_step(run, marker["step"] + 1).sample_keys == digests(run)[marker["step"] + 1]


def test_the_first_interrupt_commits_and_the_second_ends_at_once(folder):
    """As a terminal sends them to a run of one process."""
    errors = (folder / "errors").read_text
    for run, presses in ((folder / "ended", 2), (folder / "interrupted", 1)):
        words = [sys.executable, "-m", "megamm.cli", "pretrain", "recipe.toml", "--run", run.name]
        with open(folder / "errors", "w") as file:
            process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=file, preexec_fn=hear_interrupts)
        try:
            wait_for(partial(read_json_lines, run / "metrics.jsonl"), process)
            process.send_signal(signal.SIGINT)
            if presses == 2:
                wait_for(lambda: "press Ctrl-C again" in errors(), process)
                process.send_signal(signal.SIGINT)
            process.wait(timeout=120)
        finally:
            process.kill()
        assert "Traceback" not in errors() and errors().count("press Ctrl-C again") == 1, errors()[-4000:]
        assert process.returncode == (130 if presses == 2 else 0), errors()[-4000:]
        assert (run / "INTERRUPTED").exists() == (presses == 1)
    marker = json.loads((run / "INTERRUPTED").read_text())
    assert marker["reason"] == "SIGINT" and 1 <= marker["step"] < NUM_STEPS
    assert last_checkpoint(run).name == f"step_{marker['step']:08d}"


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        children = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [one for one in children if "pretrain" in one.cmdline() and "RANK" in one.environ() and one.name() != "bash"]


def wait_for(condition, launcher: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert launcher.poll() is None and time.monotonic() < end, "the run ended, or never came so far"
        time.sleep(0.05)


def test_excluded_samples_enter_the_ledger_and_nothing_else_changes(folder):
    source = folder / "unbroken" / "checkpoints" / "step_00000006"
    kept_out = sorted({f"{one.dataset}/{one.key}" for one in trace_step(folder / "unbroken", 9).samples if not one.skipped})[:3]
    (folder / "keys.txt").write_text("# a loss spike\n" + "\n".join(kept_out) + "\n")
    (folder / "wrong.txt").write_text("texts/t0003\n")
    resume = ("--resume", str(source))
    assert "did you mean 't003'" in refused(folder, "excluded", *resume, "--exclude", "wrong.txt")
    assert not (folder / "excluded").exists()

    pretrain(folder, 1, "excluded", *resume, "--exclude", "keys.txt", "--stop-after", "8", "--batch.micro_rows", "3")
    # The stop belonged to that command; what was kept out then stays out however often it is said.
    pretrain(folder, 2, "excluded", *resume, "--exclude", "keys.txt")
    run = folder / "excluded"
    unbroken = digests(folder / "unbroken")
    assert digests(run) == {step: unbroken[step] for step in range(7, NUM_STEPS + 1)}
    (recorded,) = read_data_state(last_checkpoint(run))["exclusions"]
    assert recorded == {"after_step": 6, "keys": kept_out}

    before, after = read_ledger(last_checkpoint(folder / "unbroken")), read_ledger(last_checkpoint(run))
    assert [entry for entry in after if entry["reason"] != "excluded"] == before
    planned = [one for step in range(7, NUM_STEPS + 1) for one in trace_step(folder / "unbroken", step).samples]
    expected = sorted(one.position for one in planned if f"{one.dataset}/{one.key}" in kept_out)
    assert [entry["position"] for entry in after if entry["reason"] == "excluded"] == expected
    assert len(expected) >= 3


def test_changed_data_are_refused_and_accepted_when_asked(folder):
    """Last, because it changes a shard: one more sample in `texts`."""
    source = ("--resume", str(folder / "unbroken" / "checkpoints" / "step_00000006"), "--stop-after", "8")
    tar = folder / "data" / "texts" / "train-00000.tar"
    names = [load_index(tar).key(sample) for sample in range(load_index(tar).num_samples)]
    write_index(write_tar(tar, {name: as_files(text_document(f"the word {name} is new")) for name in [*names, "t999"]}))
    line = refused(folder, "changed", *source)
    assert "shards of texts was" in line and "--accept-data-change" in line and not (folder / "changed").exists()

    pretrain(folder, 1, "changed", *source, "--accept-data-change")
    state = read_data_state(last_checkpoint(folder / "changed"))
    (change,) = state["changes"]
    assert change["after_step"] == 6 and "shards of texts" in change["changed"]
    # The next start needs no argument: the checkpoint is of the new data.
    pretrain(folder, 1, "changed", *source[:2], "--stop-after", "9")
    assert read_data_state(last_checkpoint(folder / "changed"))["changes"] == [change]
    assert trace_step(folder / "changed", 8).sample_keys == digests(folder / "changed")[8]
