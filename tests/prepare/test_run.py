import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.core.errors import ConfigError, DataError
from megamm.data.shards.index import index_path
from megamm.prepare import SOURCES
from megamm.prepare.journal import Journal
from megamm.prepare.plan import Limits, Splitting
from megamm.prepare.run import Job
from megamm.prepare.run import prepare as prepare_source
from tests.support.odd_sources import BUGGY, DEADLY, PICKY, SLOW, UNREADABLE
from tests.support.preparing import files, omitted, samples, write_shards
from tests.support.shards import jpeg

NUM_ROWS = 23
LIMITS = {"num_samples": 4}


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "in")


def write_table(folder, num_rows=NUM_ROWS):
    """Rows with a picture each; every seventh row's picture is missing, every eighth row is for the test."""
    folder.mkdir()
    rows = []
    for number in range(num_rows):
        if number % 7:
            (folder / f"{number}.jpg").write_bytes(jpeg(4 + number % 5, 3, seed=number))
        rows.append({"image": f"{number}.jpg", "label": f"label {number}", "split": "train" if number % 8 else "test", "key": f"k{number}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def prepare(output, table, **job):
    return write_shards("manifest", output, job={**LIMITS, **job}, input=table)


def everything(output):
    """Keys of all samples of all splits."""
    return {key for split in ("train", "test") for key in samples(output, split)}


def test_shards_are_cut_and_reported(tmp_path, table):
    reports = prepare(tmp_path / "out", table)
    names = [f"{split}-{number:05}.tar" for split, count in (("test", 1), ("train", 5)) for number in range(count)]
    found = files(tmp_path / "out")
    expected = [
        *names,
        *[f"{name}.index" for name in names],
        "test-report.json",
        "test-skipped.jsonl",
        "train-report.json",
        "train-skipped.jsonl",
    ]
    assert sorted(found) == sorted(expected)
    assert everything(tmp_path / "out") == {f"k{n}" for n in range(NUM_ROWS) if n % 7}
    assert sorted(key for key, _, _ in omitted(tmp_path / "out")) == ["k14", "k21", "k7"]
    assert [report.lines() for report in reports] == [
        [f"{tmp_path}/out/test-*.tar: 2 samples in 1 shard, 0.0 MB; 1 samples skipped, see test-skipped.jsonl"],
        [f"{tmp_path}/out/train-*.tar: 17 samples in 5 shards, 0.1 MB; 3 samples skipped, see train-skipped.jsonl"],
    ]
    report = json.loads(found["train-report.json"])
    assert (report["num_samples"], report["num_skipped"], report["num_omitted_parts"]) == (17, 3, 0)
    assert [(shard["name"], shard["num_bytes"]) for shard in report["shards"]] == [
        (f"train-{number:05}", len(found[f"train-{number:05}.tar"])) for number in range(5)
    ]
    assert report["made_from"]["source"] == "manifest"


def test_bytes_close_shards_too(tmp_path, table):
    prepare(tmp_path / "out", table, num_bytes=1500, num_samples=100)
    sizes = [
        sum(len(media["0.jpg"]) for _, media in part.values()) for part in (samples(tmp_path / "out", split) for split in ("train", "test"))
    ]
    assert len(list((tmp_path / "out").glob("train-*.tar"))) >= sizes[0] / 1500


def test_a_second_run_changes_nothing(tmp_path, table):
    prepare(tmp_path / "out", table)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").glob("*.tar*")}
    prepare(tmp_path / "out", table)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").glob("*.tar*")} == before


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_change_nothing(tmp_path, table, num_workers):
    prepare(tmp_path / "one", table)
    prepare(tmp_path / "many", table, num_workers=num_workers)
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_together_are_one_run(tmp_path, table, order):
    prepare(tmp_path / "one", table)
    seen = []
    for part in order:
        before = set(everything(tmp_path / "parts")) if (tmp_path / "parts").exists() else set()
        reports = prepare(tmp_path / "parts", table, part=(part, 3))
        seen.append(everything(tmp_path / "parts") - before)
        assert all(report.is_complete for report in reports) == (part == order[-1])
        assert (tmp_path / "parts" / "train-report.json").exists() == (part == order[-1])
    assert files(tmp_path / "parts") == files(tmp_path / "one")
    assert all(seen)
    assert not seen[0] & seen[1]


def test_a_part_says_what_is_left_to_others(tmp_path, table):
    lines = [line for report in prepare(tmp_path / "out", table, part=(1, 3)) for line in report.lines()]
    assert f"{tmp_path}/out/train-*.tar: 3 of 5 shards are left to other parts" in lines
    assert prepare(tmp_path / "out", table, part=(40, 41))  # more parts than shards: nothing to do


def test_a_failed_part_is_run_again_alone(tmp_path, table):
    prepare(tmp_path / "one", table)
    for part in (0, 1):
        prepare(tmp_path / "parts", table, part=(part, 2))
    lost = tmp_path / "parts" / "train-00002.tar"
    lost.unlink()
    index_path(lost).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.tar")}
    for part in (0, 1):
        prepare(tmp_path / "parts", table, part=(part, 2))
    assert files(tmp_path / "parts") == files(tmp_path / "one")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_whatever_a_kill_leaves_is_completed(tmp_path_factory, data):
    base = tmp_path_factory.mktemp("resume")
    table = write_table(base / "in")
    prepare(base / "whole", table)
    shutil.copytree(base / "whole", base / "cut")
    journal = base / "cut" / ".prepare" / "train.part-0-of-1.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(
        content[: round(data.draw(st.floats(0, 1)) * len(content))] + data.draw(st.sampled_from([b"", b"\0\0\0", b"\0\0\n", b'{"name"']))
    )
    for path in sorted((base / "cut").glob("train-*")):
        fate = data.draw(st.sampled_from(["kept", "gone", "cut", "flipped"]))
        if fate == "gone":
            path.unlink()
        elif fate == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        elif fate == "flipped":
            damaged = bytearray(path.read_bytes())
            damaged[len(damaged) // 2] ^= 1
            path.write_bytes(damaged)
    (base / "cut" / ".train-00001.tar.4711.tmp").write_bytes(b"half")
    prepare(base / "cut", table)
    assert files(base / "cut") == files(base / "whole")
    assert not list((base / "cut").glob(".*.tmp"))


KILLED = """
import sys
from pathlib import Path
from megamm.prepare.plan import Limits
from megamm.prepare.run import Job, prepare
from tests.support.odd_sources import SLOW

if __name__ == "__main__":
    prepare(SLOW, Job(Path(sys.argv[1]), limits=Limits(5), num_workers=int(sys.argv[2])))
"""


@pytest.mark.parametrize(("num_workers", "kill_after"), [(1, [1, 3]), (2, [2])])
def test_a_killed_run_is_completed_to_the_same_bytes(tmp_path, num_workers, kill_after):
    """SIGKILL while a shard is being written; nobody stays behind, and the last run equals an unbroken one."""
    prepare_source(SLOW, Job(tmp_path / "whole", limits=Limits(5)))
    (tmp_path / "run.py").write_text(KILLED)
    start = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "cut"), str(num_workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    for num_shards in kill_after:
        process = subprocess.Popen(start, env=environment)
        while process.poll() is None and not is_writing_after(num_shards, tmp_path / "cut"):
            time.sleep(0.005)
        assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("train-*.tar")}
    assert kill_after[-1] <= len(finished) < 6
    subprocess.run(start, env=environment, check=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob(".*.tmp"))
    written_again = [path for path, before in finished.items() if path.stat().st_mtime_ns != before]
    # A shard may have its name and not yet its line in the journal; no worker has more than one of those.
    assert len(written_again) <= num_workers


def is_writing_after(num_shards, output):
    return len(list(output.glob("train-*.tar"))) >= num_shards and any(path.stat().st_size for path in output.glob(".train-*.tmp"))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_the_machine_does_ends_the_run_in_one_line_and_skips_nothing(tmp_path, num_workers):
    with pytest.raises(DataError, match=r"shard .*train-0000\d\.tar: a\.jpg: Input/output error; put that right") as raised:
        prepare_source(UNREADABLE, Job(tmp_path, limits=Limits(5), num_workers=num_workers))
    assert "\n" not in str(raised.value)
    assert len(samples(tmp_path)) < 30
    assert not list(tmp_path.glob(".*.tmp"))
    assert not list(tmp_path.glob("*-report.json"))


def test_a_worker_that_dies_is_named_with_its_shard(tmp_path):
    with pytest.raises(DataError, match=r"the process that wrote shard .*train-0000\d\.tar ended by itself \(exit code -9") as raised:
        prepare_source(DEADLY, Job(tmp_path, limits=Limits(5), num_workers=2))
    assert "\n" not in str(raised.value)


def test_a_bug_in_a_worker_shows_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        prepare_source(BUGGY, Job(tmp_path, limits=Limits(5), num_workers=2))
    with pytest.raises(ZeroDivisionError):
        prepare_source(BUGGY, Job(tmp_path / "one", limits=Limits(5)))


def test_reasons_may_quote_what_is_no_text(tmp_path):
    prepare_source(PICKY, Job(tmp_path, limits=Limits(5), max_skipped=0.1))
    assert omitted(tmp_path) == [("key-017", "sample", "quoting \\ud800 what is no text")]


def test_too_many_skipped_are_an_error_that_can_be_allowed(tmp_path, table):
    with pytest.raises(
        DataError, match=r"4 of 23 samples were skipped, more than --max-skipped 0\.1 .*the first: there is no file"
    ) as raised:
        prepare(tmp_path, table, max_skipped=0.1)
    assert "train-skipped.jsonl" in str(raised.value)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    prepare(tmp_path, table, max_skipped=0.2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == written


def test_a_shard_of_skipped_records_is_no_file(tmp_path):
    rows = "".join(json.dumps({"image": "gone.jpg", "label": "a"}) + "\n" for _ in range(3))
    (tmp_path / "rows.jsonl").write_text(rows)
    reports = prepare(tmp_path / "out", tmp_path / "rows.jsonl")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [".prepare", "train-report.json", "train-skipped.jsonl"]
    assert (reports[0].num_samples, reports[0].num_skipped, reports[0].is_complete) == (0, 3, True)
    assert prepare(tmp_path / "out", tmp_path / "rows.jsonl")[0].is_complete


def test_a_second_command_on_the_same_part_is_refused(tmp_path, table):
    output = tmp_path / "out"
    first = Journal(output, "train", (0, 1))
    with first.alone(), pytest.raises(DataError, match=r"another command writes part 0/1 of .*out \(train\) at this moment"):
        prepare(output, table)
    assert prepare(output, table)[0].is_complete


def test_another_share_held_out_is_named_as_such(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {number}", "key": f"k{number}"}) + "\n" for number in range(20)))
    source = SOURCES["text"]
    prepare_source(source, Job(tmp_path / "out", splitting=Splitting(test_share=0.3)), input=rows)
    with pytest.raises(DataError, match=r"begun with test_share 0\.3, now it is 0\.4"):
        prepare_source(source, Job(tmp_path / "out", splitting=Splitting(test_share=0.4)), input=rows)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"seed": 1}, "that were begun with seed 0, now it is 1; repeat the first command, name another --output"),
        ({"num_samples": 5}, r"begun with limits \[4, 1073741824\], now it is \[5, 1073741824\]"),
        ({"part": (3, 3)}, "--part 3/3 does not exist; parts are counted from 0, so the last is 2/3"),
    ],
)
def test_shards_of_something_else_are_not_mixed(tmp_path, table, job, message):
    prepare(tmp_path / "out", table)
    before = files(tmp_path / "out")
    with pytest.raises((DataError, ConfigError), match=message):
        prepare(tmp_path / "out", table, **job)
    assert files(tmp_path / "out") == before


def test_inputs_that_changed_since_are_not_mixed(tmp_path, table):
    prepare(tmp_path / "out", table)
    table.write_text(table.read_text().replace('"label 20"', '"label 02"'))
    with pytest.raises(DataError, match="begun with inputs"):
        prepare(tmp_path / "out", table)


def test_options_that_matter_are_compared_and_places_are_not(tmp_path, table):
    prepare(tmp_path / "out", table)
    shutil.move(tmp_path / "in", tmp_path / "moved")
    assert write_shards("manifest", tmp_path / "out", job=LIMITS, input=tmp_path / "moved" / "rows.jsonl")
    with pytest.raises(DataError, match=r'begun with options .*"prompt": "".*"prompt": "Which\?"'):
        write_shards("manifest", tmp_path / "out", job=LIMITS, input=tmp_path / "moved" / "rows.jsonl", prompt="Which?")


def test_foreign_shards_are_kept(tmp_path, table):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000.tar").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"already holds train-00000\.tar; name another --output, or remove its train-\*"):
        prepare(tmp_path / "out", table)
    assert (tmp_path / "out" / "train-00000.tar").read_bytes() == b"mine"


def test_another_split_may_join_the_folder(tmp_path):
    for split in ("train", "validation"):
        table = write_table(tmp_path / split, 3)
        table.write_text(table.read_text().replace('"split"', '"part"'))
        prepare(tmp_path / "out", table, default=split)
    assert set(samples(tmp_path / "out", "train")) == set(samples(tmp_path / "out", "validation")) == {"k1", "k2"}


def test_an_output_that_is_a_file_is_named(tmp_path, table):
    (tmp_path / "out").touch()
    with pytest.raises(DataError, match=r"out.*; put that right and run the same command again"):
        prepare(tmp_path / "out", table)
