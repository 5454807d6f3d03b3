"""What only a GPU shows: page-locked snapshots that never mix two steps, and fp16's loss scale."""

import pytest
import torch
from safetensors.torch import load_file

from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import load
from megamm.checkpoint.manifest import read_manifest
from megamm.checkpoint.saver import Saver
from megamm.config.schema import Checkpointing
from megamm.engine import partitions
from tests.support.checkpoints import save
from tests.support.faults import slow
from tests.support.models import build_engine, token_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def deterministic_kernels(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def engine_of(world):
    """Engines, closed at the end."""
    engines = []

    def build(**settings):
        engines.append(build_engine(1, **settings))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def go_on(engine, world, first, last):
    losses = []
    for step in range(first, last):
        rows = token_batch(step).to(world.device)
        loss = engine(input_ids=rows, labels=rows, use_cache=False).loss
        engine.backward(loss, 1.0)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_page_locked_snapshot_is_of_one_step(engine_of, world, tmp_path):
    engine = engine_of(precision="bf16")
    go_on(engine, world, 0, 2)
    with Saver(tmp_path, engine, world, Checkpointing(), io=slow(0.05)) as saver:
        assert saver._snapshot._data.is_pinned()
        before = {key: tensor.reshape(-1).cpu().clone() for key, tensor in partitions.local_state(engine, rank=0)}
        saver.save(Progress(2))
        go_on(engine, world, 2, 6)
        saver.finish()
    read = load_file(tmp_path / "step_00000002" / "rank_00000.safetensors")
    assert [key for key in before if not torch.equal(read[key], before[key])] == []
    assert "random/torch_cuda" in read


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resume_is_bit_for_bit(engine_of, world, tmp_path, precision):
    """With fp16 the first scales overflow, so that the loss scale has a history to return to."""
    engine = engine_of(precision=precision)
    go_on(engine, world, 0, 3)
    scale = engine.loss_scale
    saved = save(tmp_path / "run", engine, world, Progress(3))
    losses = go_on(engine, world, 3, 6)
    end = read_manifest(save(tmp_path / "run", engine, world, Progress(6)))
    again = engine_of(precision=precision, seed=9)
    load(saved, again, world)
    assert again.loss_scale == scale
    assert go_on(again, world, 3, 6) == losses
    end_again = read_manifest(save(tmp_path / "again", again, world, Progress(6)))
    assert (end_again.files, end_again.engine) == (end.files, end.engine)
