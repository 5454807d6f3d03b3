"""Decoders: threads and processes give the same, what dies or hangs is noticed, named and replaced, and nothing is lost."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from megamm.config import Data, Dataset, Reading
from megamm.core.errors import ConfigError, DataError, UnreachableData
from megamm.data.loading.decoders import MAX_STUCK_THREADS, Watch
from megamm.data.loading.loader import StepLoader
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.lengths import ensure_lengths
from tests.data.conftest import BATCH, MODEL
from tests.support.decoding import SLOW_KEY, Broken, Failing, Killing, Stalling, signalling, workers, write_slow_corpus

KINDS = ["threads", pytest.param("processes", marks=pytest.mark.integration)]
PROCESSES = {"decoders": "processes", "decode_workers": 1}


def contents(batch):
    """All of a batch as plain values, arrays as types, shapes and bytes."""
    values = (getattr(batch, name) for name in batch.__slots__)
    return [(value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value for value in values]


def steps_of(plan, num_steps=30, **arguments):
    with StepLoader(plan, **arguments) as loader:
        return [([contents(batch) for batch in step.micro_batches], step.skipped) for step in itertools.islice(loader, num_steps)]


@pytest.fixture(scope="module")
def slow_root(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("slow")
    write_slow_corpus(root)
    return root


@pytest.fixture
def slow_plan(slow_root, tokenizer, settings_of):
    """A plan over small pictures and a slow one, for a model that does not hear (processes that need no torch start sooner)."""
    model = replace(MODEL, audio=None)
    ensure_lengths(sorted(slow_root.glob("*/*.tar")), tokenizer, MediaRules.of(model, Data()))

    def open_(**changes):
        data = {"train": {"slow": Dataset("slow/train-*.tar")}, "max_skipped_share": 1.0, **changes}
        return DataPlan.open(settings_of(slow_root, **data), BATCH, model=model, tokenizer=tokenizer, seed=5)

    return open_


def consume(loader, num_steps=6):
    """(delivered keys, ledger entries, planned keys) of the next steps."""
    steps = list(itertools.islice(loader, num_steps))
    delivered = [key for step in steps for batch in step.micro_batches for row in batch.keys for key in row]
    return delivered, [entry for step in steps for entry in step.skipped], [key for step in steps for key in step.keys]


def assert_nothing_is_lost(delivered, skipped, planned):
    assert sorted([*delivered, *(f"{entry.dataset}/{entry.key}" for entry in skipped)]) == sorted(planned)


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_workers": 3},
        pytest.param(PROCESSES, marks=pytest.mark.integration),
        pytest.param({**PROCESSES, "decode_workers": 3, "prefetch_steps": 5}, marks=pytest.mark.integration),
        # No row fits into the shared memory: everything travels with the messages.
        pytest.param({**PROCESSES, "prefetch_bytes": 1}, marks=pytest.mark.integration),
        # Room for about one row: the others wait for it.
        pytest.param({**PROCESSES, "decode_workers": 2, "prefetch_bytes": 60_000}, marks=pytest.mark.integration),
    ],
)
def test_all_kinds_and_numbers_of_decoders_give_equal_batches(corpus, open_plan, changes):
    # Micro-batches of six rows: several are in the shared memory at once, and none is released before the last is there.
    batch = replace(BATCH, micro_rows=6)
    assert steps_of(open_plan(corpus, batch=batch, **changes)) == steps_of(open_plan(corpus, batch=batch))


@pytest.mark.integration
def test_killed_processes_are_replaced_and_nothing_is_lost(corpus, open_plan, caplog):
    expected = steps_of(open_plan(corpus), 60)
    plan = open_plan(corpus, **{**PROCESSES, "decode_workers": 2})
    # From its second row on: killed at the first one again, the same sample would be to blame twice.
    with StepLoader(plan) as loader, signalling(loader, signal.SIGKILL, times=3, min_requests=2) as hit:
        steps = []
        while len(hit) < 3 or len(steps) < 20:
            step = next(loader)
            steps.append(([contents(batch) for batch in step.micro_batches], step.skipped))
            assert len(steps) < 5000
    num = min(len(steps), len(expected))
    assert len(hit) == 3 and steps[:num] == expected[:num]
    assert all(not skipped for _, skipped in steps)
    assert sum("its decoder died (signal 9)" in message for message in caplog.messages) == 3
    assert not any(psutil.pid_exists(pid) for pid in hit)


@pytest.mark.integration
def test_a_sample_that_kills_its_decoder_twice_enters_the_ledger(slow_plan):
    with StepLoader(slow_plan(**PROCESSES)) as loader, signalling(loader, signal.SIGKILL, times=2, seconds=0.2) as hit:
        delivered, skipped, planned = consume(loader)
        assert len(hit) == 2
    assert_nothing_is_lost(delivered, skipped, planned)
    first = skipped[0]
    assert (first.dataset, first.key, first.shard) == ("slow", SLOW_KEY, "train-00000.tar")
    assert first.reason == "its decoder died (signal 9) twice"
    assert len(skipped) == 1 and planned.count(f"slow/{SLOW_KEY}") == delivered.count(f"slow/{SLOW_KEY}") + 1


@pytest.mark.integration
def test_a_stopped_process_is_replaced_and_its_sample_delivered(slow_plan, caplog):
    with StepLoader(slow_plan(**PROCESSES)) as loader, signalling(loader, signal.SIGSTOP, times=1, seconds=0.1):
        delivered, skipped, planned = consume(loader)
    assert not skipped and sorted(delivered) == sorted(planned)
    assert any("decoder process given up at" in message and "was stopped" in message for message in caplog.messages)


@pytest.mark.parametrize(("changes", "times"), [({}, ""), pytest.param(PROCESSES, " twice", marks=pytest.mark.integration)])
def test_decoding_that_takes_too_long_costs_that_sample(slow_plan, changes, times):
    with StepLoader(slow_plan(**changes, decode_timeout_seconds=0.2)) as loader:
        delivered, skipped, planned = consume(loader, 3)
        thread_names = [thread.name for thread in threading.enumerate()]
    assert_nothing_is_lost(delivered, skipped, planned)
    assert {entry.key for entry in skipped} == {SLOW_KEY}
    assert {entry.reason for entry in skipped} == {f"decoding took more than 0.2 s{times}"}
    assert thread_names.count("decode") <= 1 + len(skipped)


def test_too_many_stuck_threads_end_the_run(slow_plan):
    with (
        StepLoader(slow_plan(decode_timeout_seconds=0.1)) as loader,
        pytest.raises(
            DataError, match=rf"{MAX_STUCK_THREADS + 1} samples took more than 0\.1 s .* the last is slow/slow in .*train-00000\.tar"
        ),
    ):
        for _ in range(200):
            next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_that_stands_still_ends_the_run_and_is_no_skip(slow_plan, monkeypatch, kind):
    monkeypatch.setattr("megamm.data.loading.open_decoders._READ_SECONDS", 0.3)
    plan = slow_plan(decoders=kind, decode_timeout_seconds=30.0, reading=Reading(timeout_seconds=0.1, retries=0))
    with StepLoader(plan, reader=Stalling("slow")) as loader:
        message = r"reading sample \d+ at byte \d+ of shard .*slow/train-00000\.tar has stood still for more than 0\.5 s"
        with pytest.raises(DataError, match=message):
            next(loader)
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < 8
    assert not workers()


@pytest.mark.integration
def test_processes_that_die_again_and_again_end_the_run(slow_plan, monkeypatch):
    monkeypatch.setattr("megamm.data.loading.decoder_processes.MAX_RESTARTS_IN_A_ROW", 2)
    message = r"lost 3 times in a row, the last time because its decoder died \(signal 9\)"
    with StepLoader(slow_plan(**PROCESSES), reader=Killing("slow")) as loader, pytest.raises(DataError, match=message):
        next(loader)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_decoders_reach_whoever_waits(slow_plan, monkeypatch, kind):
    monkeypatch.setattr("megamm.data.shards.reader._RETRY_DELAYS_SECONDS", (0.0, 0.0))
    with StepLoader(slow_plan(decoders=kind), reader=Broken("slow")) as loader:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken reader"):
                next(loader)
    with StepLoader(slow_plan(decoders=kind), reader=Failing("slow")) as loader, pytest.raises(UnreachableData, match="again and again"):
        next(loader)


@pytest.mark.integration
def test_closing_at_once_is_silent_and_leaves_nothing(corpus, open_plan, monkeypatch):
    heard = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    before = set(threading.enumerate())
    for _ in range(3):
        StepLoader(open_plan(corpus, **PROCESSES)).close()
    assert not heard and not workers() and set(threading.enumerate()) <= before


@pytest.mark.integration
def test_a_process_that_cannot_be_started_is_heard_of(corpus, open_plan, monkeypatch):
    monkeypatch.setattr("megamm.data.loading.decoder_processes.sys.executable", "/nowhere/python")
    with StepLoader(open_plan(corpus, **PROCESSES)) as loader, pytest.raises(FileNotFoundError, match="/nowhere/python"):
        next(loader)


def test_a_reader_that_cannot_be_sent_is_refused(corpus, open_plan):
    reader = Broken("words")
    reader.name = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r'set data\.decoders="threads"'):
        StepLoader(open_plan(corpus, **PROCESSES), reader=reader)


@pytest.mark.integration
def test_processes_inherit_nothing_and_leave_signals_of_the_run_to_the_run(corpus, open_plan):
    with socket.create_server(("127.0.0.1", 0)) as server, StepLoader(open_plan(corpus, **PROCESSES)) as loader:
        server.set_inheritable(True)
        next(loader)
        (worker,) = workers()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            worker.send_signal(number)
        for _ in range(5):
            next(loader)
        assert [one.pid for one in workers()] == [worker.pid]
        targets = {path.name: str(path.readlink()) for path in Path(f"/proc/{worker.pid}/fd").iterdir()}
        # Standard streams apart, its connection is the only socket.
        assert sum(target.startswith("socket:") for number, target in targets.items() if int(number) > 2) == 1
        assert not worker.net_connections(kind="inet")
        assert worker.environ()["CUDA_VISIBLE_DEVICES"] == "" and worker.environ()["OMP_NUM_THREADS"] == "1"
        assert os.getsid(worker.pid) != os.getsid(0)
        assert not any("deepspeed" in one.path for one in worker.memory_maps())


def test_time_in_which_nobody_looked_does_not_count(monkeypatch):
    """A job that Slurm suspends for an hour has not stalled."""
    clock = iter([0.0, 0.4, 0.8, 3600.0, 3600.4, 3600.8])
    monkeypatch.setattr("megamm.data.loading.decoders.time.monotonic", lambda: next(clock))
    watch = Watch()
    assert [watch.look(place) for place in ("a", "a", "a", "a", "b", "b")] == pytest.approx([0.0, 0.4, 0.8, 1.8, 0.0, 0.4])


def test_datasets_without_lengths_are_what_processes_get(corpus, open_plan, tokenizer):
    """A billion samples' lengths must not be sent to a process."""
    plan = open_plan(corpus)
    with StepLoader(plan) as loader:
        light = loader._source.datasets
    assert {name: len(one.lengths) for name, one in light.items()} == dict.fromkeys(plan.datasets, 0)
    assert all(light[name].locate(index) == plan.datasets[name].locate(index) for name in light for index in range(light[name].num_samples))
