"""Checkpoints of the real engine: bit-equal continuation, any number of ranks, a rank that cannot write."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import load
from megamm.checkpoint.manifest import rank_file, read_manifest
from megamm.checkpoint.reshard import reshard
from megamm.checkpoint.slicing import slice_bounds
from megamm.core.errors import CheckpointError
from megamm.engine import distributed, weights
from tests.support.checkpoints import save, whole_state
from tests.support.models import small_config, small_decoder, start_engine, train
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Everything split; some parameters whole and some frozen, with micro-steps; no rounding.
VARIANTS = {
    "split": {"precision": "bf16"},
    "mixed": {"precision": "bf16", "accumulation": 3, "freeze": "embed", "zero_optimization.stage3_param_persistence_threshold": 3000},
    "float32": {"precision": "fp32"},
}
SAVED, LAST = 3, 6


def decoder_that_counts():
    model = small_decoder()
    model.register_buffer("num_seen", torch.zeros(2))
    return model


def build(world, variant, seed=0):
    changes = dict(VARIANTS[variant])
    freeze = changes.pop("freeze", None)
    config = small_config(world.size, **changes)
    model = weights.partitioned(decoder_that_counts, config, seed=seed)
    for name, param in model.named_parameters():
        param.requires_grad_(freeze is None or freeze not in name)
    return start_engine(model.train(), config)


def go_on(engine, world, first, last):
    """Global losses; the buffer and the random states move with the steps."""
    losses = []
    for step in range(first, last):
        losses.append(distributed.all_reduce_sum(train(engine, world.rank, world.size, step, step + 1))[0])
        engine.module.num_seen += torch.tensor([1.0, step])
        torch.rand(1)
    return losses


def train_unbroken(folder):
    """Every variant: save after three steps, go on to six, save again."""
    world = distributed.start()
    found = {}
    for variant in VARIANTS:
        engine = build(world, variant)
        torch.manual_seed(50 + world.rank)
        root = Path(folder) / variant
        go_on(engine, world, 0, SAVED)
        save(root / "run", engine, world, Progress(SAVED, {"row": 17}, [{"key": "bad"}], {"config": "c0ffee"}))
        losses = go_on(engine, world, SAVED, LAST)
        save(root / "unbroken", engine, world, Progress(LAST))
        bounds = {name: weights.partition_bounds(param) for name, param in engine.module.named_parameters()}
        found[variant] = {"losses": losses, "bounds": bounds}
        if variant == "split":
            found["failed_save"] = fail_to_save(root, engine, world)
        engine.close()
    distributed.stop()
    return found


def fail_to_save(root, engine, world):
    """Rank 1 may not write files beyond a kilobyte: the kernel refuses, as a full disk would."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
    message = None
    try:
        save(root / "unbroken", engine, world, Progress(LAST + 1))
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    distributed.barrier()
    left = sorted(path.name for path in (root / "unbroken").iterdir())
    again = save(root / "unbroken", engine, world, Progress(LAST + 1))
    return {"message": message, "left": left, "again": newest_good(root / "unbroken", world).folder == again}


def resume(folder, source):
    """Every variant from another seed: load from `source`, save at once, go on to six, save."""
    world = distributed.start()
    found = {}
    for variant in VARIANTS:
        root = Path(folder) / variant
        engine = build(world, variant, seed=77)
        choice = newest_good(root / source, world)
        loaded = load(choice.folder, engine, world)
        save(root / f"read_by_{world.size}", engine, world, Progress(SAVED))
        losses = go_on(engine, world, SAVED, LAST)
        save(root / f"resumed_by_{world.size}", engine, world, Progress(LAST))
        found[variant] = {
            "losses": losses,
            "rest": [loaded.manifest.step, loaded.data_state, loaded.ledger, loaded.manifest.fingerprints.get("config")],
        }
        engine.close()
    found["refused"] = refuse_another_model(folder, world)
    distributed.stop()
    return found


def refuse_another_model(folder, world):
    config = small_config(world.size)
    engine = start_engine(weights.partitioned(lambda: small_decoder(intermediate_size=90), config, seed=0).train(), config)
    try:
        load(Path(folder) / "split" / "run" / "step_00000003", engine, world)
    except CheckpointError as error:
        return str(error)
    return None


def assert_same_state(one, other):
    left, right = dict(whole_state(one)), dict(whole_state(other))
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(train_unbroken, 2, str(folder))


@pytest.fixture(scope="module")
def by_two(unbroken):
    return run_ranks(resume, 2, str(unbroken[0]), "run")


@pytest.fixture(scope="module")
def by_three(unbroken):
    return run_ranks(resume, 3, str(unbroken[0]), "run")


@pytest.fixture(scope="module")
def by_one(unbroken, by_three):
    """One rank reads what three wrote that had read what two wrote."""
    return run_ranks(resume, 1, str(unbroken[0]), "read_by_3")


@pytest.fixture
def by_others(by_three, by_one):
    return {3: by_three, 1: by_one}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_arithmetic_is_the_engines_own(unbroken, variant):
    folder, found = unbroken
    shapes = {entry.name: torch.Size(entry.shape).numel() for entry in read_manifest(folder / variant / "run" / "step_00000003").parameters}
    for rank in (0, 1):
        bounds = found[rank][variant]["bounds"]
        assert {name: tuple(pair) for name, pair in bounds.items()} == {name: slice_bounds(shapes[name], 2, rank) for name in bounds}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_process_continues_bit_for_bit(unbroken, by_two, variant):
    """Losses, and every byte of every rank's shard: weights, moments, buffers and random states."""
    folder, found = unbroken
    assert by_two[0][variant]["losses"] == found[0][variant]["losses"]
    ours = read_manifest(folder / variant / "resumed_by_2" / "step_00000006")
    theirs = read_manifest(folder / variant / "unbroken" / "step_00000006")
    assert ours.files == theirs.files
    assert ours.engine == theirs.engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_between_the_checkpoints_changed_everything_that_trains(unbroken, variant):
    folder, _ = unbroken
    before = dict(whole_state(folder / variant / "run" / "step_00000003"))
    after = dict(whole_state(folder / variant / "unbroken" / "step_00000006"))
    frozen = {
        f"weight/{entry.name}" for entry in read_manifest(folder / variant / "run" / "step_00000003").parameters if entry.kind == "frozen"
    }
    assert {key for key in before if torch.equal(before[key], after[key])} == frozen
    assert bool(frozen) == (variant == "mixed")


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_numbers_of_ranks_hold_the_same_state(unbroken, by_others, variant):
    """Two to three to one, through engines: weights, moments and buffers tensor by tensor."""
    folder, _ = unbroken
    for num_ranks in by_others:
        path = folder / variant / f"read_by_{num_ranks}" / "step_00000003"
        assert read_manifest(path).world_size == num_ranks
        assert_same_state(path, folder / variant / "run" / "step_00000003")
        assert read_manifest(path).engine == read_manifest(folder / variant / "run" / "step_00000003").engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reshard_writes_what_other_numbers_of_ranks_write(unbroken, by_others, variant, tmp_path):
    """Tensor by tensor in every rank's file; only the random states are the ranks' own."""
    folder, _ = unbroken
    for num_ranks in by_others:
        ours = reshard(folder / variant / "run" / "step_00000003", tmp_path / str(num_ranks), num_ranks)
        theirs = folder / variant / f"read_by_{num_ranks}" / "step_00000003"
        for rank in range(num_ranks):
            left, right = load_file(ours / rank_file(rank)), load_file(theirs / rank_file(rank))
            assert left.keys() == {key for key in right if not key.startswith("random/")}
            assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_other_numbers_of_ranks_go_on_alike(unbroken, by_others):
    """float32: the same sums in another order. Measured 1e-7."""
    expected = unbroken[1][0]["float32"]["losses"]
    for ranks in by_others.values():
        assert ranks[0]["float32"]["losses"] == pytest.approx(expected, rel=1e-6)


def test_what_goes_with_the_state_comes_back(by_two, by_three):
    expected = [SAVED, {"row": 17}, [{"key": "bad"}], "c0ffee"]
    for rank in [*by_two, *by_three]:
        assert all(rank[variant]["rest"] == expected for variant in VARIANTS)


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(by_two):
    for rank in by_two:
        assert "model.layers.0.mlp.gate_proj.weight is trainable [97, 48] there and trainable [90, 48] here" in rank["refused"]


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_the_rest(unbroken):
    for rank in unbroken[1]:
        failed = rank["failed_save"]
        assert "step_00000007 was not written" in failed["message"]
        assert "File too large" in failed["message"]
        assert failed["left"] == ["step_00000006"]
        assert failed["again"] is True
