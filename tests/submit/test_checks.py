"""Each check finds what it is there for, and says nothing against a job that would run."""

import os

import pytest
import torch

from megamm.checkpoint.lock import RunLock
from megamm.config import to_dict
from megamm.core.files import write_json
from megamm.submit.checks import CHECKS, findings
from megamm.submit.finding import Finding
from tests.support.checkpoints import write_checkpoint


def found(plan, name: str) -> list[Finding]:
    return list(findings(CHECKS[name], plan))


def problems(plan, name: str) -> str:
    return "\n".join(one.text for one in found(plan, name) if one.level == "problem")


def test_arithmetic_of_ranks(plan):
    (one,) = found(plan(), "ranks")
    assert one.level == "ok" and one.text == "2 nodes × 2 = 4 ranks; 6 rows a step in 1 micro-step × 3 rows a rank, 6 of them empty"
    assert "less than one row a rank at world size 8" in problems(plan(sbatch=("--nodes=2-4", "--gpus-per-node=2")), "ranks")
    words = ("--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=8")
    assert "8 tasks on 2 GPUs a node" in problems(plan(sbatch=words), "ranks")
    assert "set batch.global_rows to 24" in problems(plan("--batch.accumulation=2"), "ranks")


def test_a_run_folder_that_is_new_used_done_or_stopped(plan, tmp_path):
    run = tmp_path / "run"
    assert [one.level for one in found(plan(), "run")] == ["ok"]
    (run / "photos").mkdir(parents=True)
    assert "is not empty and holds no run" in problems(plan(), "run")
    (run / "photos").rmdir()
    write_json(run / "config.json", to_dict(plan().recipe))
    write_checkpoint(run / "checkpoints", 5, {})
    assert "goes on from step 5" in found(plan(), "run")[0].text
    assert "recipe differs in optim.lr" in problems(plan("--optim.lr", "0.5"), "run")
    assert "--resume never would overwrite it" in problems(plan(resume="never"), "run")
    (run / "STOP").touch()
    assert "STOP is there" in problems(plan(), "run")
    (run / "STOP").unlink()
    (run / "DONE").write_text("{}")
    assert "is done" in problems(plan(), "run")


def test_a_run_that_a_job_works_on_is_left_to_it(plan, tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_json(run / "config.json", to_dict(plan().recipe))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    lock = RunLock.acquire(run, lease_seconds=60.0)
    try:
        told = problems(plan(), "run")
        assert "is starting" in told and "--sbatch=--dependency=afterany:41" in told
        assert not problems(plan(sbatch=("--nodes=2", "--gpus-per-node=2", "--dependency=afterany:41")), "run")
    finally:
        lock.release()


def test_data_that_are_there_and_lengths_that_are_to_be_planned(plan):
    told = found(plan(), "data")
    assert {one.level for one in told} == {"ok", "note"}
    assert [one.text.partition(":")[0] for one in told] == ["pictures", "sounds", "both", "texts", "4 shards have no planned lengths"]


def test_data_that_are_missing(plan, data, tmp_path):
    assert "data.train names no dataset" in problems(plan("--data.train={}"), "data")
    assert "no shard matches" in problems(plan("--data.train.texts.shards=none/*.tar"), "data")
    assert "lacks tokenizer.json" in problems(plan(f"--tokenizer.folder={tmp_path}"), "data")
    shard = tmp_path / "texts-00000.tar"
    os.link(data / "texts" / "train-00000.tar", shard)
    assert f"{shard} has no index" in problems(plan(f"--data.train.texts.shards={shard}"), "data")
    remote = [
        one for one in found(plan("--data.train.texts.shards=https://host/{0..9}.tar?signature=secret"), "data") if "host" in one.text
    ]
    assert [one.level for one in remote] == ["note"] and "secret" not in remote[0].text


def test_space_for_what_is_kept(plan, tmp_path):
    write_checkpoint(tmp_path / "run" / "checkpoints", 5, {"weight": torch.zeros(1000)})
    (told,) = found(plan("--checkpoint.keep_last=3"), "space")
    assert told.level == "ok" and told.text.startswith("4 checkpoints of ") and "as that of step 5" in told.text
    # More than any disk holds.
    told = problems(plan("--checkpoint.keep_last=10000000000"), "space")
    assert "short; make room, lower checkpoint.keep_last" in told
    (_, more) = found(plan("--train.steps=10000000000", "--checkpoint.keep_every=1"), "space")
    assert more.level == "note" and "keeps 10,000,000,000 more for ever" in more.text


@pytest.mark.integration
def test_space_is_worked_out_from_the_parameters_where_torch_is_at_hand(plan, monkeypatch, tmp_path):
    (told,) = found(plan("--model.vision.trainable=false"), "space")
    assert told.level == "ok" and "of them frozen" in told.text
    folder = tmp_path / "blocked"
    folder.mkdir()
    (folder / "torch.py").write_text('raise ImportError("no torch here")\n')
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (told,) = found(plan(), "space")
    assert told.level == "note" and "what a checkpoint takes is not known" in told.text and "no torch here" in told.text


def test_where_there_is_no_slurm(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not on PATH" in problems(plan(), "slurm")


def test_scripts_are_read_by_bash(plan):
    (told,) = found(plan(), "scripts")
    assert told.level == "ok"


def test_parts_of_an_array(plan, monkeypatch):
    def parts(array):
        return found(plan(command="prepare", recipe=None, run=None, sbatch=(f"--array={array}",)), "parts")[0]

    assert parts("0-63%8").text == "64 parts" and parts("0").text == "1 part"
    assert parts("3,7").level == "problem" and "set MEGAMM_PARTS" in parts("3,7").text
    monkeypatch.setenv("MEGAMM_PARTS", "64")
    assert parts("3,7").level == "ok"


def test_a_model_that_is_there_and_its_output(plan, tmp_path):
    run, output = tmp_path / "run", tmp_path / "out"

    def planned(command="evaluate", **changes):
        return plan(command=command, recipe=None, output=output, **changes)

    assert "is no run folder" in problems(planned(), "model")
    write_json(run / "config.json", to_dict(plan().recipe))
    assert "has no checkpoint yet" in problems(planned(), "model")
    checkpoint = write_checkpoint(run / "checkpoints", 5, {})
    (told,) = found(planned(), "model")
    assert told.level == "note" and "newest checkpoint is of step 5" in told.text
    assert found(planned("export", run=checkpoint), "model")[0].text == f"{checkpoint} is a checkpoint of {run}"
    assert [one.level for one in found(planned("export"), "output")] == ["ok"]
    output.mkdir()
    (output / "model.safetensors").touch()
    assert "is in use" in problems(planned("export"), "output")
    assert [one.level for one in found(planned("prepare"), "output")] == ["ok"]


def test_shards_before_there_is_a_tokenizer(plan, tmp_path):
    told = found(plan(f"--tokenizer.folder={tmp_path}", command="tokenize"), "shards")
    assert [one.level for one in told] == ["ok"] * 4
    assert "no shard matches" in problems(plan("--data.train.texts.shards=none/*.tar", command="tokenize"), "shards")
