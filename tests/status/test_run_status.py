"""One run and many: found, read while they change, told whatever is wrong with their folders."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from megamm.checkpoint.lock import RunLock
from megamm.core.errors import ConfigError
from megamm.core.files import write_json
from megamm.status.run_status import find_runs, read_status
from megamm.status.show import page, table
from tests.status.conftest import metrics_line
from tests.support.checkpoints import write_checkpoint


def one(run):
    (status,) = read_status([run])
    return status


def told(run) -> str:
    return "\n".join(page(one(run)))


def test_a_page_says_what_the_files_say(run, owned):
    lines = (metrics_line(step, mfu=0.41, skipped_samples=3, **{"skipped/texts": 3}) for step in range(1, 501))
    (run / "metrics.jsonl").write_text("".join(lines))
    write_checkpoint(run / "checkpoints", 400, {})
    text = told(run)
    for expected in (
        "state       running",
        "500 of 2,000 (25.0 %)",
        "50,000",
        "200 tokens/s, MFU 41.0 %",
        "50 min, at 2 s a step",
        "4 on ",
        "step 400, ",
        "3 samples (texts 3)",
    ):
        assert expected in text, text


def test_a_damaged_checkpoint_is_noted_and_the_one_before_is_told(run):
    for step in (100, 200):
        write_checkpoint(run / "checkpoints", step, {})
    manifest = run / "checkpoints" / "step_00000200" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    text = told(run)
    assert "step 100, " in text and "step_00000200: manifest.json is damaged" in text


def test_the_cause_is_told_and_not_its_echo(run, die):
    die(run, 3)
    facts = {"start": 1, "step": 8, "message": "no", "traceback": "", "phase": "train"}
    write_json(run / "errors/start_00001.rank_00000.json", {**facts, "rank": 0, "kind": "RuntimeError", "time": 1e9, "lost_peer": True})
    write_json(run / "errors/start_00001.rank_00001.json", {**facts, "rank": 1, "kind": "OSError", "time": 1e9 + 1, "lost_peer": False})
    assert "start 1, rank 1, step 8: OSError: no" in told(run)
    assert one(run).state == "failed"


def test_files_that_are_something_else_are_noted(run):
    (run / "metrics.jsonl").mkdir()
    write_json(run / ".lock" / "00000001.owner", {"job_id": 7})
    write_json(run / "environment.json", {"launcher": {"WORLD_SIZE": "many"}})
    status = one(run)
    text = "\n".join(page(status))
    assert "metrics.jsonl cannot be read: Is a directory" in text and "00000001.owner" in text and "environment.json is not as" in text
    json.loads(json.dumps(status.to_json(), allow_nan=False))


def test_a_run_that_begins_has_an_owner_and_nothing_else(tmp_path):
    lock = RunLock.acquire(tmp_path / "runs" / "new", lease_seconds=60.0)
    try:
        (found,) = find_runs(tmp_path)
        assert one(found).state == "starting"
    finally:
        lock.release()
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs(tmp_path)


def test_runs_are_found_below_a_folder_and_nothing_else_is_taken_for_one(run, tmp_path):
    runs = run.parent
    write_json(runs / "group" / "two" / "config.json", {})
    (runs / "empty").mkdir()
    (runs / ".trash" / "old").mkdir(parents=True)
    write_json(runs / ".trash" / "old" / "config.json", {})
    # An exported folder, and a job that trains no run, as `megamm submit` keeps it.
    for name, mark in (("export", "parity.json"), ("jobs/snapshots/0001", "submission.json")):
        for file in ("config.json", mark):
            write_json(runs / name / file, {})
    assert find_runs(runs) == [runs / "group" / "two", run]
    assert find_runs(run) == [run]
    for folder, message in ((runs / "empty", "holds no run"), (runs / "none", "does not exist"), (run / "config.json", "is a file")):
        with pytest.raises(ConfigError, match=message):
            find_runs(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_a_folder_without_permission_is_told_among_the_others(run):
    closed = run.parent / "closed"
    write_json(closed / "config.json", {})
    closed.chmod(0o700)
    above = [folder for folder in run.parents if folder.stat().st_uid == 0 and folder.stat().st_mode & 0o005 != 0o005]
    modes = {folder: folder.stat().st_mode for folder in above}
    for folder in above:
        folder.chmod(modes[folder] | 0o055)
    os.seteuid(65534)
    try:
        found = read_status(find_runs(run.parent))
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)
    assert [(status.facts.run.name, status.state) for status in found] == [("closed", "unreadable"), ("one", "idle")]
    assert "Permission denied" in found[0].why


def test_a_hundred_runs_with_a_gigabyte_of_metrics_each(tmp_path, run):
    config = (run / "config.json").read_text()
    for number in range(100):
        folder = tmp_path / "many" / f"run-{number:03d}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
        with (folder / "metrics.jsonl").open("wb") as file:
            file.seek(1 << 30)
            file.write(b"\n" + metrics_line(number + 1).encode())
    began = time.monotonic()
    lines = table(read_status(find_runs(tmp_path / "many")))
    seconds = time.monotonic() - began
    assert len(lines) == 101 and "100/2000" in lines[-1]
    # 0.3 s on an idle machine; reading the files would take minutes.
    assert seconds < 10


def test_reading_while_everything_is_replaced(run, owned):
    """Files vanish, come back and are cut short under the reader: it tells what it finds, and never fails."""
    end = threading.Event()

    def change():
        step = 0
        while not end.is_set():
            step += 1
            with (run / "metrics.jsonl").open("a") as file:
                file.write(metrics_line(step)[: 20 if step % 3 else None])
            write_checkpoint(run / "checkpoints", step, {})
            for old in sorted((run / "checkpoints").glob("step_*"))[:-1]:
                old.rename(old.with_name(f".{old.name}.deleted"))
            (run / "INTERRUPTED").write_text("{" if step % 2 else "{}")
            (run / "INTERRUPTED").unlink()
            if step % 10 == 0:
                (run / "metrics.jsonl").unlink()

    changing = threading.Thread(target=change)
    changing.start()
    try:
        states = {one(run).state for _ in range(60)}
    finally:
        end.set()
        changing.join()
    assert states == {"running"}


def test_a_line_a_run_fits_its_columns(run, die):
    die(run, 0)
    header, line = table([one(Path(run))])
    assert header.split()[:3] == ["run", "state", "step"] and "dead" in line and "0/2000" in line
