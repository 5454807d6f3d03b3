"""Waiting for tasks that hang: real stores, one of them behind a process that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megamm.core.env import RankInfo
from megamm.preflight.links import measure_links
from megamm.preflight.meeting import Meeting, Unreachable, absent_nodes, planned_nodes, within

SERVER = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(1000)
"""


def meeting_of(rank, world_size, store, timeout_seconds):
    return Meeting(RankInfo(rank=rank, local_rank=0, world_size=world_size), store, timeout_seconds)


@pytest.mark.integration
@pytest.mark.timeout(120)
def test_a_first_node_that_hangs_is_not_waited_for():
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        try:
            store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False, timeout=timedelta(seconds=60))
            meeting = meeting_of(1, 2, store, 30.0)
            meeting.put("here", 1)
            assert meeting.follow("here") == 1
            os.kill(server.pid, signal.SIGSTOP)
            meeting.timeout_seconds = 1.0
            # Each by itself waits for ever: nothing closes the connection.
            for call in (lambda: meeting.follow("present"), lambda: meeting.put("here", 2), meeting.end_round):
                with pytest.raises(Unreachable, match="does not answer within 1 s"):
                    call()
        finally:
            server.kill()


def test_a_round_that_misses_a_task_is_the_last_one():
    meeting = meeting_of(0, 2, dist.HashStore(), 0.1)
    meeting.end_round()
    assert not meeting.is_whole
    # Who comes late hears the same.
    late = meeting_of(1, 2, meeting.store, 0.1)
    late.end_round()
    assert not late.is_whole
    began = meeting.num_rounds
    measure_links(meeting, {"a": [0], "b": [1]}, 1 << 20)
    assert meeting.num_rounds == began and meeting.gather("links", [0]) == {0: {}}


def test_a_round_that_all_come_to_is_whole():
    store = dist.HashStore()
    meetings = [meeting_of(rank, 3, store, 30.0) for rank in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(Meeting.end_round, meetings))
    assert all(meeting.is_whole for meeting in meetings)


def test_within_gives_values_and_errors_and_leaves_behind_what_hangs():
    assert within(30, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        within(30, divmod, 7, 0)
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        within(0.01, time.sleep, 1)


def test_who_works_is_waited_for_and_who_is_silent_is_not():
    store = dist.HashStore()
    waiting, working = (meeting_of(rank, 3, store, 1.0) for rank in (0, 1))
    # Longer than anybody may be silent; the third task never says anything.
    ready = threading.Event()

    def work():
        end = time.monotonic() + 3 * waiting.timeout_seconds
        while time.monotonic() < end:
            working.beat()
            ready.wait(0.05)
        working.post("facts", "slow")

    with ThreadPoolExecutor(1) as threads:
        threads.submit(work)
        assert waiting.gather("facts", [1, 2]) == {1: "slow"}
    with pytest.raises(Unreachable, match="shows no work for 1 s"):
        meeting_of(2, 3, store, 1.0).follow("never")


def test_who_does_not_come_has_the_name_that_the_script_knows(monkeypatch):
    monkeypatch.delenv("MEGAMM_NODES", raising=False)
    assert absent_nodes({0: "n1", 1: "n1", 2: "n7"}, 4, planned_nodes()) == {"the node of rank 3": 1}
    # No scontrol needs to be at hand, as in a container.
    monkeypatch.setenv("MEGAMM_NODES", "n1 n7 n9")
    # However ranks are dealt to nodes: one after the other, or in turn.
    assert absent_nodes({0: "n1", 1: "n1", 4: "n9", 5: "n9"}, 6, planned_nodes()) == {"n7": 2}
    assert absent_nodes({0: "n1", 2: "n9", 3: "n1", 4: "n7", 5: "n9"}, 6, planned_nodes()) == {"n7": 1}
    # Names that the script does not know are no reason to accuse those that it does.
    assert absent_nodes({0: "n1", 1: "n1", 4: "x", 5: "x"}, 6, planned_nodes()) == {"the node of rank 2": 1, "the node of rank 3": 1}
