"""Loading streams: what it holds at once is a tensor, not a state."""

import sys
from pathlib import Path

import pytest
import torch

from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import Slices, load
from megamm.checkpoint.reshard import reshard
from megamm.engine import distributed, weights
from tests.support.checkpoints import save
from tests.support.models import small_config, start_engine
from tests.support.ranks import run_ranks

_MIB = 1 << 20


def anonymous_bytes():
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.distributed
def test_loading_holds_a_tensor_at_a_time(tmp_path):
    """72 MiB of state in tensors of 1 MiB, written by three ranks and read by one."""
    ((num_bytes, largest, grown),) = run_ranks(load_while_watched, 1, str(tmp_path))
    assert (num_bytes, largest) == (72 * _MIB, _MIB)
    # The slice, the parts it is made of, and what the allocator keeps.
    assert grown < 8 * _MIB


def load_while_watched(folder):
    """Bytes of all slices, of the largest one, and by how much memory grew above what it was."""
    world = distributed.start()
    config = small_config(1)
    model = weights.partitioned(lambda: torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(24))), config, seed=0)
    engine = start_engine(model.train(), config)
    source = reshard(save(Path(folder) / "run", engine, world, Progress(1)), Path(folder) / "by_three", 3)
    load(source, engine, world)
    seen, sizes = [], []
    read = Slices.read

    def watched(self, key, start, stop):
        tensor = read(self, key, start, stop)
        seen.append(anonymous_bytes())
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    Slices.read = watched
    before = anonymous_bytes()
    load(source, engine, world)
    engine.close()
    distributed.stop()
    return sum(sizes), max(sizes), max(seen) - before
