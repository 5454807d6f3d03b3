import pytest

from megamm.checkpoint.lock import RunLock
from megamm.checkpoint.manifest import MANIFEST, aside, committed
from megamm.checkpoint.operators import describe, entries, listing, prune
from megamm.config.schema import Checkpointing
from megamm.core.errors import CheckpointError
from tests.support.checkpoints import some_tensors, write_checkpoint


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30):
        write_checkpoint(tmp_path / "run" / "checkpoints", step, some_tensors())
    return tmp_path / "run"


@pytest.fixture
def folder(run):
    return run / "checkpoints"


def test_a_listing_says_what_can_be_seen(folder):
    (folder / "step_00000010" / MANIFEST).unlink()
    (folder / "step_00000020").rename(folder / "step_00000020.damaged-1")
    shard = folder / "step_00000030" / "rank_00001.safetensors"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    seen = entries(folder)
    assert [(entry.name, entry.step) for entry in seen] == [
        ("step_00000010", 10),
        ("step_00000030", 30),
        ("step_00000020.damaged-1", None),
    ]
    assert "never committed" in seen[0].problem
    assert (seen[1].world_size, seen[1].problem) == (2, "")
    assert seen[1].num_bytes == sum(path.stat().st_size for path in (folder / "step_00000030").iterdir() if path.name != MANIFEST)
    assert "rank_00001" in entries(folder, verified=True)[1].problem


def test_a_listing_is_a_line_an_entry(run, folder):
    (folder / "step_00000010" / "ledger.jsonl").write_text("")
    lines = listing(entries(folder, verified=True), verified=True)
    assert len(lines) == 3 and "ledger.jsonl" in lines[0] and lines[1].endswith("verified")
    assert all(line.endswith("committed") for line in listing(entries(folder)))
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        entries(run.parent / "nowhere" / "checkpoints")


def test_a_description_says_what_the_manifest_says(folder):
    facts = describe(folder / "step_00000020")
    assert (facts["step"], facts["world_size"], facts["num_skipped_samples"]) == (20, 2, 2)
    assert facts["num_parameters"] == {"trainable": 27, "frozen": 0, "buffer": 1, "base": 0} and facts["base"] is None


def test_pruning_deletes_what_a_good_newest_one_replaces(run, folder):
    (folder / "step_00000010").rename(folder / "step_00000010.damaged-1")
    assert prune(run, Checkpointing(keep_last=1)) == ["step_00000020"]
    assert prune(run, Checkpointing(keep_last=1), set_aside=True) == ["step_00000010.damaged-1"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000030"]


def test_nothing_is_pruned_when_the_newest_one_is_damaged(run, folder):
    (folder / "step_00000030" / "ledger.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl"):
        prune(run, Checkpointing(keep_last=1))
    assert len(committed(folder)) == 3


def test_a_folder_that_somebody_emptied_is_no_crash(run, folder, monkeypatch):
    """Between the look at the folder and the moment that it is owned."""
    acquire = RunLock.acquire

    def empty_first(*arguments, **options):
        for _, path in committed(folder):
            path.rename(aside(path, "damaged"))
        return acquire(*arguments, **options)

    monkeypatch.setattr(RunLock, "acquire", empty_first)
    with pytest.raises(CheckpointError, match="holds no checkpoint; nothing was deleted"):
        prune(run, Checkpointing(keep_last=1), set_aside=True)
    assert len(list(folder.glob("*.damaged-1"))) == 3
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        prune(run, Checkpointing(keep_last=1))


def test_nothing_is_pruned_under_a_job(run, folder):
    lock = RunLock.acquire(run, lease_seconds=0.6)
    with pytest.raises(CheckpointError, match="in use by"):
        prune(run, Checkpointing(keep_last=1))
    lock.release()
    assert len(committed(folder)) == 3
    assert prune(run, Checkpointing(keep_last=1)) == ["step_00000010", "step_00000020"]
