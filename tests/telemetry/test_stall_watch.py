import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.telemetry.heartbeat import Heartbeats, beat, doing, read_beats
from megamm.telemetry.stall_watch import Stillness, allowance, findings, table
from megamm.telemetry.whereabouts import Place, Whereabouts, Who

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Sample:
    dataset: str = "speech"
    shard: str = "train-00003.tar"
    key: str = "s017"
    micro_step: int = 0
    row: int = 0


def place(phase="train", step=7, *, is_first=False, samples=()):
    return Place(phase, step, time.monotonic(), is_first, lambda: samples)


def beat_of(rank, *, phase="train", step=7, is_stalled=True, **facts):
    one = beat(Who(1, rank, 4), place(phase, step), 3, num_collectives=100, is_stalled=is_stalled)
    return dataclasses.replace(one, **facts)


@pytest.mark.parametrize(
    ("stall_seconds", "longest", "where", "expected"),
    [
        (0.0, 0.0, place(), 600),
        (0.0, 30.0, place(), 600),
        (0.0, 90.0, place(), 900),
        (0.0, 90.0, place("save"), 5400),
        (0.0, 0.0, place(is_first=True), 1800),
        (0.0, 0.0, place("start", is_first=True), 3600),
        (0.0, 0.0, place("evaluate"), 1800),
        # A number is what the person said, however long steps are.
        (20.0, 90.0, place(), 20),
        (20.0, 90.0, place("data", is_first=True), 60),
    ],
)
def test_each_phase_has_its_allowance(stall_seconds, longest, where, expected):
    assert allowance(stall_seconds, where, longest) == expected


def test_time_in_which_nobody_looked_does_not_count():
    stillness, at = Stillness(2.0), place()
    assert [stillness.look(at, now) for now in (0.0, 1.0, 2.0)] == [0, 1, 2]
    # The whole job was suspended for an hour.
    assert stillness.look(at, 3602.0) == 4
    # The same again is progress, and so is anything else.
    assert stillness.look(place(), 3603.0) == 0


@given(st.lists(st.floats(0, 100), max_size=20))
def test_stillness_never_runs_ahead_of_the_clock(gaps):
    stillness, at, now = Stillness(5.0), place(), 0.0
    first = stillness.look(at, now)
    for gap in gaps:
        now += gap
        assert 0 <= stillness.look(at, now) - first <= now + 1e-9


def test_whereabouts_measure_steps_but_not_the_first_nor_what_comes_between(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    where = Whereabouts()
    for step, (waits, trains, evaluates) in enumerate([(50, 100, 0), (1, 2, 30), (2, 2, 0)], start=1):
        where.enter("data", step)
        clock[0] += waits
        where.enter("train", step)
        clock[0] += trains
        where.enter("evaluate", step)
        clock[0] += evaluates / 2
        where.enter("evaluate", step)
        clock[0] += evaluates / 2
        assert where.place.is_first_step is False
        where.enter("save", step)
        clock[0] += 1000
        if step == 2:
            assert where.evaluation_seconds == 30
    assert where.longest_step_seconds == 4


def test_a_beat_names_the_sample_when_it_takes_long():
    fresh = beat(Who(2, 1, 4), place(samples=(Sample(),)), 0, num_collectives=9)
    assert (fresh.shard, fresh.key) == ("", "")
    told = beat(Who(2, 1, 4), place(samples=(Sample(),)), 0, num_collectives=9, is_stalled=True)
    assert (told.start, told.rank, told.shard, told.key, told.num_collectives) == (2, 1, "train-00003.tar", "speech/s017", 9)


def test_what_another_thread_sees_of_the_main_one():
    seen = threading.Event()

    def look():
        end = time.monotonic() + 20
        while time.monotonic() < end and not seen.is_set():
            if "join (threading" in doing():
                seen.set()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen.is_set()


def test_heartbeats_are_read_whole_or_not_at_all(tmp_path):
    heartbeats = Heartbeats(tmp_path)
    assert read_beats(tmp_path, 1) == []
    ones = [beat_of(rank) for rank in (0, 1, 2)]
    for one in ones:
        heartbeats.write(one)
    assert read_beats(tmp_path, 1) == ones
    (heartbeats.folder / "start_00001.rank_00001.json").write_text('{"rank": 1')
    (heartbeats.folder / "start_00001.rank_00002.json").write_text("[]")
    assert read_beats(tmp_path, 1) == ones[:1]
    for rank in range(3):
        heartbeats.remove(1, rank)
    assert not heartbeats.folder.exists()


def test_a_rank_of_an_earlier_start_that_comes_back_late_changes_nothing_of_a_later_one(tmp_path):
    heartbeats = Heartbeats(tmp_path)
    new, late = beat_of(0, start=3), beat_of(0, start=2, is_stalled=True)
    for one in (late, new, late):
        heartbeats.write(one)
    assert (read_beats(tmp_path, 2), read_beats(tmp_path, 3), read_beats(tmp_path, 4)) == ([late], [new], [])
    heartbeats.remove(2, 0)
    assert read_beats(tmp_path, 3) == [new]
    for start in (2, 3, 4):
        heartbeats.write(beat_of(0, start=start))
        heartbeats.tell(start)
    # The late one believes that it begins, or leaves in order.
    heartbeats.clear_before(2)
    assert all(read_beats(tmp_path, start) and heartbeats.is_told(start) for start in (2, 3, 4))
    heartbeats.clear_before(3)
    assert [bool(read_beats(tmp_path, start)) and heartbeats.is_told(start) for start in (2, 3, 4)] == [False, True, True]


def test_a_beat_costs_little(tmp_path):
    """Of processor time, a thousandth of the ten seconds after which it comes again; a step pays for its notes alone."""
    heartbeats, where = Heartbeats(tmp_path), Whereabouts()
    begin = time.thread_time()
    for number in range(20):
        heartbeats.write(beat(Who(1, 0, 1), where.place, number, num_collectives=0))
    assert (time.thread_time() - begin) / 20 < 0.01
    begin = time.thread_time()
    for step in range(1000):
        where.enter("data", step)
        where.enter("train", step)
    assert (time.thread_time() - begin) / 1000 < 0.001


def test_findings_name_the_silent_the_missing_and_who_is_elsewhere():
    beats = [beat_of(0), beat_of(1, phase="data"), beat_of(2, is_stalled=False)]
    assert findings(beats, [2], 4) == (
        "rank 2 is silent: stopped, or gone; rank 3 was never heard; rank 1 in data of step 7; rank 0, 2 in train of step 7"
    )
    assert findings([beat_of(rank) for rank in range(4)], [], 4) == ""
    many = findings([beat_of(rank, is_stalled=False) for rank in range(40)], list(range(40)), 40)
    assert many == "rank 0, 1, 2, 3, 4, 5, 6, 7 and 32 more is silent: stopped, or gone"
    lines = table(beats, [2])
    assert len(lines) == 4 and "silent for 0 s" in lines[3] and "reports" in lines[1]


_HANGING = """
    import ctypes, os, sys, threading
    from pathlib import Path
    from megamm.telemetry.heartbeat import read_beats
    from megamm.telemetry.stall_watch import StallWatch
    from megamm.telemetry.whereabouts import Whereabouts, Who

    run, begun = Path(sys.argv[1]), sys.argv[2] == "begun"
    (run / "logs").mkdir()
    if begun:
        (run / "config.json").touch()
    where = Whereabouts()
    where.enter("data", 1)
    where.enter("train", 1)
    where.enter("data", 2)
    if sys.argv[3] == "broken":
        (run / "heartbeats").touch()
    if sys.argv[3] == "blocked":
        os.mkfifo(run / "logs" / "stall.rank_00000.txt")
    with StallWatch(run, Who(1, 0, 1), where, stall_seconds=0.5, num_collectives=lambda: 0):
        if sys.argv[3] == "locked":
            while not any(beat.count > 1 for beat in read_beats(run, 1)):
                where.enter("data", 2)
            # Called with the interpreter's lock held: no other thread of Python runs.
            ctypes.PyDLL(None).sleep(600)
        threading.Event().wait()
"""


def hanging(run, *words):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_HANGING), str(run), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.integration
@pytest.mark.parametrize(("begun", "state"), [("begun", "well"), ("begun", "broken"), ("begun", "blocked"), ("new", "well")])
def test_a_process_ends_whatever_its_folder_is_like(tmp_path, begun, state):
    ended = hanging(tmp_path, begun, state)
    assert ended.returncode == 1 and "no progress for" in ended.stderr, ended.stderr
    assert "data of step 2" in ended.stderr
    stacks = tmp_path / "logs" / "stall.rank_00000.txt"
    if (begun, state) == ("begun", "well"):
        assert "most recent call first" in stacks.read_text() and (tmp_path / "errors" / "start_00001.stall.json").is_file()
    else:
        # Where they cannot, or must not, be written they are shown.
        assert "most recent call first" in ended.stderr
    if begun == "new":
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs"]


@pytest.mark.integration
@pytest.mark.parametrize(("start", "is_ended"), [(1, False), (2, True)])
def test_what_a_start_that_lost_the_run_tells_ends_no_later_one(tmp_path, start, is_ended):
    """A rank on a node that was cut off hangs, finds so, and reaches the folder again."""
    program = """
        import sys
        import threading
        from pathlib import Path
        from megamm.telemetry.stall_watch import StallWatch
        from megamm.telemetry.heartbeat import Heartbeats, read_beats
        from megamm.telemetry.whereabouts import Whereabouts, Who

        run = Path(sys.argv[1])
        (run / "config.json").touch()
        (run / "logs").mkdir()
        Heartbeats(run).tell(int(sys.argv[2]))
        where = Whereabouts()
        watch = StallWatch(run, Who(2, 0, 1), where, stall_seconds=600, num_collectives=lambda: 0)
        watch._beat_seconds = 0.01
        with watch:
            while not any(beat.count > 3 for beat in read_beats(run, 2)):
                threading.Event().wait(0.01)
    """
    words = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(start)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert (ended.returncode == 1) == is_ended, ended.stderr
    assert ("another rank has found that nothing moves" in ended.stderr) == is_ended


@pytest.mark.integration
def test_stacks_are_shown_without_the_interpreters_lock(tmp_path):
    words = [sys.executable, "-c", textwrap.dedent(_HANGING), str(tmp_path), "begun", "locked"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        assert process.stderr is not None
        timer = threading.Timer(60, process.kill)
        timer.start()
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "<string>" in line:
                break
        timer.cancel()
        process.kill()
    assert "Timeout" in lines[0] and "<string>" in lines[-1], lines


@pytest.mark.integration
def test_a_rank_that_was_suspended_as_a_whole_says_so_and_goes_on(tmp_path):
    program = """
        import select
        import sys
        from pathlib import Path
        from megamm.telemetry.heartbeat import read_beats
        from megamm.telemetry.stall_watch import StallWatch
        from megamm.telemetry.whereabouts import Whereabouts, Who

        run = Path(sys.argv[1])
        (run / "config.json").touch()
        where = Whereabouts()
        where.enter("data", 1)
        where.enter("train", 1)
        where.enter("data", 2)
        watch = StallWatch(run, Who(1, 0, 1), where, stall_seconds=1, num_collectives=lambda: 0)
        watch._gather_seconds = 0.1
        with watch:
            while not any(beat.count > 3 for beat in read_beats(run, 1)):
                where.enter("data", 2)
            print("begun", flush=True)
            while not select.select([sys.stdin], [], [], 0.01)[0]:
                where.enter("data", 2)
    """
    words = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        timer = threading.Timer(60, process.kill)
        timer.start()
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        # The timer's time passes, and a process that is stopped tells nobody of it.
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        told = []
        while not told or "did nothing at all for" not in told[-1]:
            told.append(process.stderr.readline())
            assert told[-1], told
        process.stdin.write("leave\n")
        process.stdin.close()
        assert process.wait() == 0
        timer.cancel()
    assert "Timeout" in told[0] and "suspended" in told[-1]


def test_a_rank_that_leaves_takes_its_heartbeat_along_and_what_earlier_starts_left(tmp_path):
    from megamm.telemetry.stall_watch import StallWatch

    (tmp_path / "config.json").touch()
    Heartbeats(tmp_path).write(beat_of(3, start=1))
    with StallWatch(tmp_path, Who(2, 0, 1), Whereabouts(), stall_seconds=60, num_collectives=lambda: 0):
        end = time.monotonic() + 20
        while not read_beats(tmp_path, 2) and time.monotonic() < end:
            time.sleep(0.01)
        assert len(read_beats(tmp_path, 2)) == 1
    assert not (tmp_path / "heartbeats").exists()
