"""Optimizer state on a drive: refused where it cannot be, and the same training where it can."""

import ctypes.util
import os
import shutil
from pathlib import Path

import pytest

from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import load
from megamm.checkpoint.manifest import read_manifest
from megamm.core.errors import ConfigError
from megamm.engine import distributed
from megamm.engine.drive import check_drive
from tests.support.checkpoints import save
from tests.support.models import build_engine, train
from tests.support.ranks import run_ranks

_PATH = "zero_optimization.offload_optimizer.nvme_path"


def missing():
    """What this machine lacks for building DeepSpeed's `async_io`; empty for nothing."""
    folders = [Path("/usr/include"), *map(Path, filter(None, os.environ.get("CPATH", "").split(":")))]
    absent = [] if any((folder / "libaio.h").is_file() for folder in folders) else ["libaio's headers (libaio-dev)"]
    return ", ".join(absent + [name for name in ("c++", "ninja") if shutil.which(name) is None])


def train_from_a_drive(folder):
    """Without a drive and with one: two steps, a checkpoint, two more; then these again from the checkpoint."""
    world = distributed.start()
    found = {}
    for name, settings in {"memory": {"preset": "zero3_offload"}, "drive": {"preset": "zero3_nvme", _PATH: folder}}.items():
        root = Path(folder) / "runs" / name
        engine = build_engine(world.size, freeze="embed", **settings)
        train(engine, world.rank, world.size, 0, 2)
        saved = save(root, engine, world, Progress(2))
        losses = train(engine, world.rank, world.size, 2, 4)
        end = save(root, engine, world, Progress(4))
        engine.close()
        again = build_engine(world.size, seed=9, freeze="embed", **settings)
        load(saved, again, world)
        resumed = train(again, world.rank, world.size, 2, 4)
        end_again = save(root / "again", again, world, Progress(4))
        again.close()
        found[name] = {"losses": losses, "resumed": resumed, "ends": [str(end), str(end_again)]}
    distributed.stop()
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(missing()), reason=f"cannot build DeepSpeed's async_io without {missing()}")
def test_a_drive_trains_saves_and_resumes_as_memory_does(tmp_path, monkeypatch):
    # Built once for both ranks; torch locks the folder.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions")))
    for rank in run_ranks(train_from_a_drive, 2, str(tmp_path), timeout_seconds=900):
        assert rank["drive"]["resumed"] == rank["drive"]["losses"] == rank["memory"]["losses"]
        ends = [read_manifest(Path(path)) for path in (*rank["drive"]["ends"], *rank["memory"]["ends"])]
        assert all(end.files == ends[0].files and end.engine == ends[0].engine for end in ends)


def config_of(path):
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(path)}}}


def test_a_drive_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is no folder; set zero_optimization\.offload_optimizer\.nvme_path"):
        check_drive(config_of(tmp_path / "nowhere"))


@pytest.mark.skipif(not missing() or ctypes.util.find_library("aio") is not None, reason="this machine can build it")
def test_a_machine_without_asynchronous_files_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"needs DeepSpeed's async_io, .*; install libaio-dev and a compiler, or use the preset zero3_offload"
    ):
        check_drive(config_of(tmp_path))


def test_settings_without_a_drive_pass():
    check_drive({"zero_optimization": {"stage": 2}})
