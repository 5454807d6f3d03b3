"""What is left when sbatch takes the job, refuses it, or says nothing.

A program stands in for sbatch: no test can make a real one lose its answer (tests/slurm/test_submit.py asks the real one).
"""

import json
import shutil

import pytest

from megamm.core.errors import ConfigError
from megamm.submit import slurm
from megamm.submit.slurm import submit

TAKES = "[ $1 = --test-only ] || echo '12;cluster'"
REFUSES = "[ $1 = --test-only ] || { echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }"
SLEEPS = "[ $1 = --test-only ] || exec sleep 60"


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Put an sbatch first on PATH that runs these words; other programs of Slurm are not there."""

    def put(words: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "sbatch").write_text(f"#!/bin/bash\n{words}\n")
        (folder / "sbatch").chmod(0o755)
        for name in ("bash", "git", "env", "sleep"):
            (folder / name).symlink_to(shutil.which(name) or "nowhere")
        monkeypatch.setenv("PATH", str(folder))

    return put


@pytest.fixture
def request_of(plan, tmp_path):
    """A request whose run folder lies below folders that are not there either; its checkpoints' size is not worked out."""
    return plan(run=tmp_path / "team" / "runs" / "one").request


@pytest.fixture(autouse=True)
def _no_count(monkeypatch):
    # Counting parameters takes seconds of importing torch, and has a test of its own.
    monkeypatch.setattr("megamm.submit.space._COUNT_SECONDS", 0.0)


def test_a_job_that_is_taken_is_recorded(answer, request_of):
    answer(TAKES)
    lines = list(submit(request_of, dry_run=False))
    folder = request_of.run / "submissions" / "0001"
    record = json.loads((folder / "submission.json").read_text())
    assert record["job_id"] == "12" and record["num_ranks"] == 4 and record["command"][0] == "sbatch"
    assert record["environment"]["MEGAMM_HOME"] == str(folder) and (request_of.run / "logs").is_dir()
    assert any(line.startswith("submitted job 12: ") for line in lines)


def test_a_job_that_is_refused_leaves_nothing(answer, request_of, tmp_path):
    answer(REFUSES)
    with pytest.raises(ConfigError, match="sbatch refused the job: sbatch: error: QOSMaxSubmitJobPerUserLimit"):
        list(submit(request_of, dry_run=False))
    assert not (tmp_path / "team").exists()


def test_where_sbatch_says_nothing_the_job_may_be_there_and_keeps_what_it_needs(answer, request_of, monkeypatch):
    answer(SLEEPS)
    monkeypatch.setattr(slurm, "_TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ConfigError, match="may have taken the job: look at `squeue --me`"):
        list(submit(request_of, dry_run=False))
    assert (request_of.run / "submissions" / "0001" / "slurm" / "pretrain.sh").is_file()
