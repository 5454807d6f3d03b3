"""Checkpoints of the real engine: bit-equal continuation, one rank to two to three to one, a rank that cannot write."""

import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from megamm.checkpoint.choose import newest_good
from megamm.checkpoint.commit import Progress
from megamm.checkpoint.load import load
from megamm.checkpoint.manifest import rank_file, read_manifest
from megamm.checkpoint.reshard import reshard
from megamm.checkpoint.slicing import slice_bounds
from megamm.core.errors import CheckpointError
from megamm.engine import distributed, weights
from tests.support.checkpoints import save, whole_state
from tests.support.models import small_config, small_decoder, small_decoder_config, start_engine, train
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]
_TIMEOUT_SECONDS = 600.0

NUM_ROWS = 6
# "micro": a row a micro-step, so that another number of ranks is another accumulation as well. "frozen": what does not train.
# "elsewhere": changes where one or three ranks read it.
VARIANTS = {
    "split": {},
    "mixed": {"micro": True, "frozen": "model.embed", "zero_optimization.stage3_param_persistence_threshold": 3000},
    "float32": {"precision": "fp32"},
    "adapters": {"preset": "zero3_offload", "frozen": "model.|lm_head", "elsewhere": {"preset": "zero3"}},
    "one-node": {
        "preset": "zero3_hpz",
        "micro": True,
        "frozen": "model.embed",
        "zero_optimization.zero_hpz_partition_size": 2,
        "elsewhere": {"preset": "zero3"},
    },
    "zero2": {"preset": "zero2", "precision": "fp32", "micro": True, "elsewhere": {"preset": "zero3"}},
    "zero1": {"preset": "zero1", "micro": True, "frozen": "model.embed", "elsewhere": {"preset": "zero2"}},
}
FLOAT32 = ["float32", "zero2"]
BEGUN, SAVED, LAST = 1, 3, 6


class AdaptedDecoder(Qwen3ForCausalLM):
    """A stock decoder with what fine-tuning adds: a small trainable module beside each block, and a buffer that moves."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("num_seen", torch.zeros(2))
        self.adapters = torch.nn.ModuleList(LowRank(config.hidden_size) for _ in self.model.layers)
        for layer, adapter in zip(self.model.layers, self.adapters, strict=True):
            layer.mlp.register_forward_hook(lambda module, inputs, output, adapter=adapter: output + adapter(inputs[0]))


class LowRank(torch.nn.Module):
    """As LoRA: the second matrix begins as zeros, so that training starts from the model as it was."""

    def __init__(self, width, rank=4):
        super().__init__()
        self.down = torch.nn.Linear(width, rank, bias=False)
        self.up = torch.nn.Linear(rank, width, bias=False)
        self.up.weight.data.zero_()

    def forward(self, hidden):
        return self.up(self.down(hidden))


def build(world, variant, seed=0):
    changes = dict(VARIANTS[variant])
    elsewhere = changes.pop("elsewhere", {})
    frozen = changes.pop("frozen", None)
    if world.size != 2 and elsewhere:
        changes = {key: value for key, value in changes.items() if "." not in key} | elsewhere
    if changes.pop("micro", False):
        changes["accumulation"] = NUM_ROWS // world.size
    config = small_config(world.size, **changes)
    model = weights.partitioned(lambda: AdaptedDecoder(small_decoder_config()), config, seed=seed)
    for name, param in model.named_parameters():
        param.requires_grad_(frozen is None or re.match(frozen, name) is None)
    return start_engine(model.train(), config)


def go_on(engine, world, first, last):
    """Global losses; the buffer and the random states move with the steps."""
    losses = []
    for step in range(first, last):
        losses.append(distributed.all_reduce_sum(train(engine, world.rank, world.size, step, step + 1))[0])
        engine.module.num_seen += torch.tensor([1.0, step])
        torch.rand(1)
    return losses


def begin_alone(folder):
    """Every variant: one step of one rank."""
    world = distributed.start()
    for variant in VARIANTS:
        engine = build(world, variant)
        go_on(engine, world, 0, BEGUN)
        save(Path(folder) / variant / "begun", engine, world, Progress(BEGUN))
        engine.close()
    distributed.stop()


def train_unbroken(folder):
    """Every variant: take over from one rank, save at once, after three steps, and after six."""
    world = distributed.start()
    found = {}
    for variant in VARIANTS:
        engine = build(world, variant, seed=33)
        root = Path(folder) / variant
        load(newest_good(root / "begun", world).folder, engine, world)
        save(root / "begun_read_by_2", engine, world, Progress(BEGUN))
        torch.manual_seed(50 + world.rank)
        go_on(engine, world, BEGUN, SAVED)
        save(root / "run", engine, world, Progress(SAVED, {"row": 17}, [{"key": "bad"}], {"config": "c0ffee"}))
        losses = go_on(engine, world, SAVED, LAST)
        save(root / "unbroken", engine, world, Progress(LAST))
        bounds = {name: weights.partition_bounds(param) for name, param in engine.module.named_parameters() if hasattr(param, "ds_tensor")}
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
    left = sorted(path.name for path in (root / "unbroken").iterdir() if path.name != "latest")
    again = save(root / "unbroken", engine, world, Progress(LAST + 1))
    return {"message": message, "left": left, "again": newest_good(root / "unbroken", world).folder == again}


def resume(folder, source):
    """Every variant from another seed: load from `source`, save at once, go on to six, save."""
    world = distributed.start()
    found = {}
    unpickled, watching = [], []
    sys.addaudithook(lambda event, what: unpickled.append(str(what)) if event == "pickle.find_class" and watching else None)
    for variant in VARIANTS:
        root = Path(folder) / variant
        engine = build(world, variant, seed=77)
        watching.append(variant)
        choice = newest_good(root / source, world)
        loaded = load(choice.folder, engine, world)
        watching.clear()
        save(root / f"read_by_{world.size}", engine, world, Progress(SAVED))
        losses = go_on(engine, world, SAVED, LAST)
        save(root / f"resumed_by_{world.size}", engine, world, Progress(LAST))
        found[variant] = {
            "losses": losses,
            "rest": [loaded.manifest.step, loaded.data_state, loaded.ledger, loaded.manifest.fingerprints.get("config")],
        }
        engine.close()
    found["refused"] = refuse_another_model(folder, world)
    found["unpickled"] = unpickled
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
    run_ranks(begin_alone, 1, str(folder), timeout_seconds=_TIMEOUT_SECONDS)
    return folder, run_ranks(train_unbroken, 2, str(folder), timeout_seconds=_TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def by_two(unbroken):
    return run_ranks(resume, 2, str(unbroken[0]), "run", timeout_seconds=_TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def by_three(unbroken):
    return run_ranks(resume, 3, str(unbroken[0]), "run", timeout_seconds=_TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def by_one(unbroken, by_three):
    """One rank reads what three wrote that had read what two wrote."""
    return run_ranks(resume, 1, str(unbroken[0]), "read_by_3", timeout_seconds=_TIMEOUT_SECONDS)


@pytest.fixture
def by_others(by_three, by_one):
    return {3: by_three, 1: by_one}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith(("zero1", "zero2"))])
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
    assert bool(frozen) == ("frozen" in VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_hold_the_state_of_one(unbroken, variant):
    """Under another preset and another accumulation, where the variant says so."""
    folder, _ = unbroken
    begun, read = (folder / variant / name / "step_00000001" for name in ("begun", "begun_read_by_2"))
    assert [read_manifest(path).world_size for path in (begun, read)] == [1, 2]
    assert_same_state(read, begun)
    assert read_manifest(read).engine == read_manifest(begun).engine


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_numbers_of_ranks_hold_the_same_state(unbroken, by_others, variant):
    """On from one to two: to three, to one, through engines; weights, moments and buffers tensor by tensor."""
    folder, _ = unbroken
    for num_ranks in by_others:
        path = folder / variant / f"read_by_{num_ranks}" / "step_00000003"
        assert read_manifest(path).world_size == num_ranks
        assert_same_state(path, folder / variant / "run" / "step_00000003")
        assert read_manifest(path).engine == read_manifest(folder / variant / "run" / "step_00000003").engine


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "zero1"])
def test_a_reshard_writes_what_other_numbers_of_ranks_write(unbroken, by_others, variant, tmp_path):
    """Tensor by tensor in every rank's file; only the random states are the ranks' own, and how three ranks of ZeRO-2 cut."""
    folder, _ = unbroken
    for num_ranks in by_others:
        ours = reshard(folder / variant / "run" / "step_00000003", tmp_path / str(num_ranks), num_ranks)
        theirs = folder / variant / f"read_by_{num_ranks}" / "step_00000003"
        for rank in range(num_ranks):
            left, right = load_file(ours / rank_file(rank)), load_file(theirs / rank_file(rank))
            assert left.keys() == {key for key in right if not key.startswith("random/")}
            assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("variant", FLOAT32)
def test_other_numbers_of_ranks_go_on_alike(unbroken, by_others, variant):
    """float32: the same sums in another order. Measured 1e-7."""
    expected = unbroken[1][0][variant]["losses"]
    for ranks in by_others.values():
        assert ranks[0][variant]["losses"] == pytest.approx(expected, rel=1e-6)


def test_stages_train_alike(unbroken):
    """The same training under other stages, with other buffers, and with a copy in each node: the same losses to rounding."""
    losses = {variant: unbroken[1][0][variant]["losses"] for variant in VARIANTS}
    assert losses["zero2"] == pytest.approx(losses["float32"], rel=1e-6)
    assert losses["one-node"] == pytest.approx(losses["zero1"], rel=1e-3)
    assert losses["mixed"] == pytest.approx(losses["zero1"], rel=1e-3)


def test_what_goes_with_the_state_comes_back(by_two, by_three):
    expected = [SAVED, {"row": 17}, [{"key": "bad"}], "c0ffee"]
    for rank in [*by_two, *by_three]:
        assert all(rank[variant]["rest"] == expected for variant in VARIANTS)


def test_nothing_is_unpickled(by_two, by_three):
    """Python itself tells of every class that a pickle names."""
    assert [rank["unpickled"] for rank in [*by_two, *by_three]] == [[]] * 5


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
