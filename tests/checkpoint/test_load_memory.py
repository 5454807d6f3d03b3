"""Loading streams: what it holds at once is a tensor, not a state."""

import sys
from pathlib import Path

import pytest
import torch

from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import Slices, load
from megamm.checkpoint.reshard import reshard
from megamm.engine import weights
from tests.support.checkpoints import save
from tests.support.models import small_config, start_engine

_MIB = 1 << 20


def anonymous_bytes():
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_a_tensor_at_a_time(world, tmp_path, monkeypatch):
    """72 MiB of state in tensors of 1 MiB, written by three ranks and read by one."""
    config = small_config(1)
    model = weights.partitioned(lambda: torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(24))), config, seed=0)
    engine = start_engine(model.train(), config)
    source = reshard(save(tmp_path / "run", engine, world, Progress(1)), tmp_path / "by_three", 3)
    load(source, engine, world)
    seen, sizes = [], []
    read = Slices.read

    def watched(self, key, start, stop):
        tensor = read(self, key, start, stop)
        seen.append(anonymous_bytes())
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(Slices, "read", watched)
    before = anonymous_bytes()
    load(source, engine, world)
    engine.close()
    assert (sum(sizes), max(sizes)) == (72 * _MIB, _MIB)
    # The slice, the parts it is made of, and what the allocator keeps.
    assert max(seen) - before < 8 * _MIB
