"""Optimizer state on a drive: refused where it cannot be, and the same training where it can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import load
from megamm.checkpoint.manifest import read_manifest
from megamm.config import to_dict
from megamm.core.errors import ConfigError
from megamm.engine import distributed, weights
from megamm.engine.drive import OwnFolder, open_drive
from tests.support import async_io
from tests.support.checkpoints import save
from tests.support.models import small_config, small_decoder, start_engine, train
from tests.support.ranks import run_ranks
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over

_PATH = "zero_optimization.offload_optimizer.nvme_path"


def build(world, seed=0, **changes):
    """Two sub-groups of more than a MiB a rank: DeepSpeed keeps smaller ones in memory. The embedding is frozen."""
    config = small_config(world.size, **changes, **{"zero_optimization.sub_group_size": 300_000})
    model = weights.partitioned(lambda: small_decoder(hidden_size=288, intermediate_size=577), config, seed=seed)
    for name, param in model.named_parameters():
        param.requires_grad_("embed" not in name)
    return start_engine(model.train(), config)


def train_from_a_drive(folder):
    """Without a drive and with one: a checkpoint, two steps, another one, two more; then these again from the second checkpoint."""
    world = distributed.start()
    found = {}
    drive = Path(folder) / "drive"
    drive.mkdir(exist_ok=True)
    for name, settings in {"memory": {"preset": "zero3_offload"}, "drive": {"preset": "zero3_nvme", _PATH: str(drive)}}.items():
        root = Path(folder) / "runs" / name
        engine = build(world, **settings)
        save(root, engine, world, Progress(0))
        train(engine, world.rank, world.size, 0, 2)
        saved = save(root, engine, world, Progress(2))
        losses = train(engine, world.rank, world.size, 2, 4)
        end = save(root, engine, world, Progress(4))
        distributed.barrier()
        num_bytes = [sum(path.stat().st_size for path in own.rglob("*.swp")) for own in drive.iterdir()]
        distributed.barrier()
        engine.close()
        again = build(world, seed=9, **settings)
        load(saved, again, world)
        resumed = train(again, world.rank, world.size, 2, 4)
        end_again = save(root / "again", again, world, Progress(4))
        again.close()
        found[name] = {"losses": losses, "resumed": resumed, "ends": [str(end), str(end_again)], "num_bytes": num_bytes}
    distributed.stop()
    return found


@pytest.fixture
def extensions(request, monkeypatch):
    # One ninja, however the tests were started: another version's would compile all of it again, in each of the ranks.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    cache = request.config.cache.mkdir("async_io")
    if not async_io.built(cache).is_dir() and "MEGAMM_COMPILE" not in os.environ:
        pytest.skip("DeepSpeed's async_io is not compiled, which takes five minutes: set MEGAMM_COMPILE=1 once")
    async_io.install()
    if reason := async_io.missing():
        pytest.skip(reason)
    folder = async_io.build(cache, timeout_seconds=1500)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("extensions")
def test_a_drive_trains_saves_and_resumes_as_memory_does(tmp_path):
    """About 12 seconds, and before them two or three minutes of compiling where it was not done yet."""
    for rank in run_ranks(train_from_a_drive, 2, str(tmp_path), timeout_seconds=900):
        assert rank["drive"]["resumed"] == rank["drive"]["losses"] == rank["memory"]["losses"]
        ends = [read_manifest(Path(path)) for path in (*rank["drive"]["ends"], *rank["memory"]["ends"])]
        assert all(end.files == ends[0].files and end.engine == ends[0].engine for end in ends)
        assert rank["memory"]["num_bytes"] == []
        # A folder a rank. Masters and both moments are on the drive: more than the weights of a rank in float32.
        assert len(rank["drive"]["num_bytes"]) == 2 and min(rank["drive"]["num_bytes"]) > 3e6, rank["drive"]["num_bytes"]
    assert list((tmp_path / "drive").iterdir()) == []


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("extensions")
@pytest.mark.parametrize("words", [["--train.steps=3"], ["--resume", "nowhere"]])
def test_a_run_leaves_nothing_on_its_drive(tmp_path, words):
    """However it ends: done, or refused when the model was built."""
    make_data(tmp_path / "data")
    (tmp_path / "drive").mkdir()
    nvme = ["--engine.preset=zero3_nvme", f"--engine.overrides.{_PATH}={tmp_path / 'drive'}"]
    write_recipe(tmp_path / "recipe.toml", to_dict(recipe_over(tmp_path / "data", *nvme)))
    program = [sys.executable, "-m", "megamm.cli", "pretrain", "recipe.toml", "--run", "run", *words]
    ended = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert (ended.returncode == 0) == (tmp_path / "run" / "DONE").is_file() == (words[0] != "--resume"), ended.stderr
    assert list((tmp_path / "drive").iterdir()) == []


def config_of(path):
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(path)}}}


def test_a_drive_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is no folder; set zero_optimization\.offload_optimizer\.nvme_path"):
        open_drive(config_of(tmp_path / "nowhere"))


def test_a_machine_that_cannot_compile_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(
        ConfigError, match=r"needs DeepSpeed's async_io, .*; install libaio-dev and a compiler, or use the preset zero3_offload"
    ):
        open_drive(config_of(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_settings_without_a_drive_pass():
    settings = {"zero_optimization": {"stage": 2}}
    assert open_drive(settings) == (settings, None)


HOLDER = """
import sys
from pathlib import Path
from megamm.engine.drive import OwnFolder
print(OwnFolder(Path(sys.argv[1])).path, flush=True)
sys.stdin.read()
"""


def test_processes_on_one_drive_keep_apart_and_the_dead_are_swept_away(tmp_path):
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = Path(other.stdout.readline().strip())
        (theirs / "1.tensor.swp").write_bytes(b"moments")
        (tmp_path / "somebody's").mkdir()
        mine = OwnFolder(tmp_path)
        assert mine.path != theirs
        assert (theirs / "1.tensor.swp").read_bytes() == b"moments"
        other.kill()
    mine.close()
    assert [path.name for path in tmp_path.iterdir() if path != theirs] == ["somebody's"]
    OwnFolder(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody's"]


def test_a_drive_that_cannot_be_written_to_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot hold optimizer state \(.*Not a directory"):
        OwnFolder(Path("/dev/null"))
