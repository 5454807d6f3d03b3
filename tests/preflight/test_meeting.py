"""Waiting for tasks that hang: real stores, one of them behind a process that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megamm.core.env import RankInfo
from megamm.preflight.links import measure_links
from megamm.preflight.meeting import Meeting, Unreachable, node_of, planned_nodes, within

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
            assert meeting.ask("here", 30) == 1
            os.kill(server.pid, signal.SIGSTOP)
            meeting.timeout_seconds = 1.0
            # Each by itself waits for ever: nothing closes the connection.
            for call in (lambda: meeting.ask("present", 1), lambda: meeting.put("here", 2), meeting.end_round):
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
    assert meeting.num_rounds == began and meeting.ask("links/0", 1) == {}


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


def test_who_does_not_come_has_the_name_that_the_script_knows(monkeypatch):
    monkeypatch.delenv("MEGAMM_NODES", raising=False)
    assert node_of(3, 4, planned_nodes()) == "the node of rank 3"
    # No scontrol needs to be at hand, as in a container.
    monkeypatch.setenv("MEGAMM_NODES", "n1 n7")
    assert [node_of(rank, 4, planned_nodes()) for rank in range(4)] == ["n1", "n1", "n7", "n7"]
