"""Checkpoints rewritten for other numbers of ranks, without an engine."""

import errno
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamm.checkpoint.load import Slices
from megamm.checkpoint.manifest import MANIFEST, committed, rank_file, read_manifest, verify
from megamm.checkpoint.reshard import reshard
from megamm.checkpoint.shards import write_file
from megamm.core.errors import CheckpointError
from tests.support.checkpoints import some_tensors, whole_state, write_checkpoint
from tests.support.faults import WatchedIo, failing, recording


def same_state(one, other):
    left, right = dict(whole_state(one)), dict(whole_state(other))
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_one_two_three_one_gives_the_same_bytes_back(tmp_path, num_threads):
    """Weights, both moments and buffers tensor by tensor on the way, and equal files at its end."""
    first = write_checkpoint(tmp_path / "0", 5, some_tensors(), num_ranks=1, fill=0.25)
    path = first
    for number, world_size in enumerate([2, 3, 1], start=1):
        path = reshard(path, tmp_path / str(number) / "checkpoints", world_size, num_threads=num_threads)
        assert verify(path).world_size == world_size
        assert same_state(path, first)
    assert read_manifest(path).files == read_manifest(first).files


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chain_of_ranks_and_sizes_keeps_the_state(tmp_path_factory, chain, sizes):
    folder = tmp_path_factory.mktemp("chain")
    tensors = {f"t{index}": torch.randn(size) for index, size in enumerate(sizes)}
    first = path = write_checkpoint(folder / "first", 5, tensors, num_ranks=2, fill=0.5)
    for number, world_size in enumerate(chain):
        path = reshard(path, folder / str(number), world_size)
    assert same_state(path, first)


def test_random_states_stay_with_an_unchanged_number_of_ranks(tmp_path):
    first = write_checkpoint(tmp_path / "0", 5, some_tensors(), num_ranks=2, random={"random/x": torch.arange(9)})
    for world_size, expected in ((2, [list(range(9)), [value + 1 for value in range(9)]]), (3, [])):
        path = reshard(first, tmp_path / str(world_size), world_size)
        with Slices(path, read_manifest(path)) as slices:
            states = [slices.random_states(rank) for rank in range(world_size)]
        assert [state["random/x"].tolist() for state in states if state] == expected


def test_a_damaged_source_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "0", 5, some_tensors())
    (source / "rank_00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="rank_00001"):
        reshard(source, tmp_path / "1", 3)
    assert not (tmp_path / "1").exists()


def test_a_step_that_the_target_holds_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "0", 5, some_tensors())
    with pytest.raises(CheckpointError, match="holds step_00000005 already"):
        reshard(source, tmp_path / "0", 3)
    assert same_state(source, source)


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    source = write_checkpoint(tmp_path / "0", 5, some_tensors())
    operations = []
    reshard(source, tmp_path / "1", 3, io=recording(operations))
    for at in range(len(operations) - 1):
        target = tmp_path / f"full-{at}"
        with pytest.raises(CheckpointError, match="No space left"):
            reshard(source, target, 3, io=failing(at, errno.ENOSPC))
        assert committed(target) == []
        assert not target.exists() or list(target.iterdir()) == []


def test_a_shard_that_is_none_leaves_nothing_behind(tmp_path):
    """Its digest is right: whoever wrote the manifest vouched for it."""
    source = write_checkpoint(tmp_path / "0", 5, some_tensors())
    manifest = read_manifest(source)
    manifest.files[rank_file(1)] = write_file(source / rank_file(1), [b"no safetensors"])
    write_file(source / MANIFEST, [manifest.to_text().encode()])
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors cannot be read"):
        reshard(source, tmp_path / "1", 3)
    assert not (tmp_path / "1").exists() or list((tmp_path / "1").iterdir()) == []


@pytest.mark.parametrize("num_threads", [1, 3])
def test_ctrl_c_leaves_nothing_behind(tmp_path, num_threads):
    """Pressed while a shard is written."""
    source = write_checkpoint(tmp_path / "0", 5, some_tensors())
    pressed, heard = threading.Lock(), threading.Event()

    def interrupted(number, frame):
        heard.set()
        raise KeyboardInterrupt

    def press(number, operation, path):
        if operation == "write":
            if pressed.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
            assert heard.wait(60)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            reshard(source, tmp_path / "1", 9, num_threads=num_threads, io=WatchedIo(press))
    finally:
        signal.signal(signal.SIGINT, before)
    assert list((tmp_path / "1").iterdir()) == []
    assert verify(reshard(source, tmp_path / "1", 9)).world_size == 9


def anonymous_bytes():
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """96 MiB of state in tensors of 1 MiB take a few MiB at a time, one tensor of 32 MiB about its size."""
    peaks = []
    for name, num_tensors, num_elements in (("one", 1, 8 << 20), ("many", 32, 1 << 18)):
        tensors = {f"t{index:02d}": torch.zeros(num_elements) for index in range(num_tensors)}
        source = write_checkpoint(tmp_path / name, 5, tensors, num_ranks=2)
        del tensors
        gc.collect()
        before, seen = anonymous_bytes(), []
        io = WatchedIo(lambda number, operation, path, seen=seen: seen.append(anonymous_bytes()))
        reshard(source, tmp_path / f"{name}-target", 3, io=io)
        peaks.append((max(seen) - before) / (1 << 20))
    assert peaks[1] < 6 < 10 < peaks[0] < 36
