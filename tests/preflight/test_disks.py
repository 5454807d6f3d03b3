"""Turns of nodes that share a disk, and folders that cannot be written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megamm.core.env import RankInfo
from megamm.core.errors import ConfigError
from megamm.preflight.disks import check_writable, disk, folders_of, forget, measure_disks, plan_turns, sign
from megamm.preflight.meeting import Meeting


def test_nodes_that_share_a_disk_write_in_turn_and_those_with_their_own_at_once():
    shared = {rank: {"run_disk": "a", "scratch_disk": node} for rank, node in ((0, "a"), (2, "b"), (4, "c"))}
    turns = plan_turns(shared)
    assert turns == [("scratch_disk", [0, 2, 4]), ("run_disk", [0]), ("run_disk", [2]), ("run_disk", [4])]
    # Where a folder could not be signed there is nothing to write.
    del shared[2]["run_disk"]
    assert plan_turns(shared)[1:] == [("run_disk", [0]), ("run_disk", [4])]
    assert plan_turns({}) == []


def test_of_a_thousand_nodes_a_few_write_at_once():
    turns = plan_turns({rank: {"run_disk": "a"} for rank in range(1000)})
    assert len(turns) <= 64 and max(len(ranks) for _, ranks in turns) == 16
    assert sorted(rank for _, ranks in turns for rank in ranks) == list(range(1000))


def test_no_two_tasks_write_a_shared_disk_at_the_same_time():
    store, num_writing, seen = dist.HashStore(), [], []

    def task(rank):
        meeting = Meeting(RankInfo(rank=rank, local_rank=0, world_size=3), store, 30.0)

        def measure(name):
            num_writing.append(rank)
            seen.append((name, list(num_writing)))
            num_writing.remove(rank)
            return rank

        return measure_disks(meeting, {one: {"run_disk": "a"} for one in range(3)}, measure)

    with ThreadPoolExecutor(3) as threads:
        found, *others = threads.map(task, range(3))
    assert seen == [("run_disk", [rank]) for rank in range(3)]
    assert found == {rank: {"run_disk": rank} for rank in range(3)} and others == [{}, {}]


def test_nodes_see_whether_they_share_a_folder(tmp_path):
    (tmp_path / "own").mkdir()
    assert [sign(tmp_path, "t1", "a"), sign(tmp_path, "t1", "b"), sign(tmp_path / "own", "t1", "c")] == ["a", "a", "c"]
    assert sign(tmp_path, "t2", "b") == "b"
    for token in ("t1", "t2", "t2"):
        forget(tmp_path, token)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_slow_disk_has_a_short_turn_and_says_after_each_block_that_it_works(tmp_path, monkeypatch):
    blocks: list[int] = []
    found = disk(tmp_path, 8 << 20, lambda: blocks.append(1))
    assert len(blocks) == 2 and found["write_mib_per_second"] > 0 and found["free_gib"] > 0
    monkeypatch.setattr("megamm.preflight.disks._TURN_SECONDS", 0.0)
    disk(tmp_path, 64 << 20, lambda: blocks.append(1))
    assert len(blocks) == 3
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_is_missing_or_not_a_folder_is_told_in_the_words_of_the_site(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAMM_SCRATCH", str(tmp_path / "scratch"))
    folder = folders_of(tmp_path / "runs" / "one")["scratch_disk"]
    with pytest.raises(ConfigError, match=f"MEGAMM_SCRATCH={folder} is no folder; make it on every node"):
        check_writable("scratch_disk", folder)
    folder.write_text("")
    with pytest.raises(ConfigError, match="is no folder"):
        check_writable("scratch_disk", folder)
    folder.unlink()
    folder.mkdir()
    check_writable("scratch_disk", folder)
    assert folders_of(tmp_path / "runs" / "one")["run_disk"] == tmp_path
