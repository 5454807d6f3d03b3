"""`megamm submit` as it is called, where there is no torch and no Slurm."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from megamm.cli import main
from megamm.cli.submit import words_of_pretrain
from megamm.cli.training import pretrain_arguments
from tests.support.login_node import login_node


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--resume", "never", "--accept-data-change"],
        ["--exclude", "keys.txt", "--max-seconds", "60", "--stop-after", "7"],
        ["--skip-steps", "41-49", "--rewind-on-spike"],
    ],
)
def test_options_of_the_command_reach_the_job_as_they_were_said(words):
    parser = argparse.ArgumentParser()
    pretrain_arguments(parser)
    said = parser.parse_args(["tiny", *words])
    assert parser.parse_args(["tiny", *words_of_pretrain(said)]) == said


def test_a_rehearsal_without_torch_and_slurm_tells_everything_and_writes_nothing(recipe: Path, tmp_path: Path):
    environment = login_node(tmp_path / "blocked") | {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CONF": "/nowhere"}
    before = sorted(tmp_path.rglob("*"))
    words = ["submit", "slurm", "pretrain", str(recipe), "--run", str(tmp_path / "run"), "--nodes=2", "--gpus-per-node=2", "--dry-run"]
    answer = subprocess.run(
        [sys.executable, "-B", "-m", "megamm.cli", *words], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    told = answer.stdout
    assert "note     space " in told and "there is no torch on a login node" in told, told + answer.stderr
    assert "problem  slurm " in told and told.rstrip().endswith("nothing was submitted and nothing written (--dry-run)")
    assert answer.returncode == 1 and answer.stderr == "megamm: nothing was submitted: 1 problem (see above)\n"
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


def test_words_that_are_wrong_are_one_line(capsys):
    for words in (["pbs", "pretrain", "tiny"], ["slurm", "train", "tiny"]):
        with pytest.raises(SystemExit) as left:
            main(["submit", *words])
        assert left.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert main(["submit", "slurm", "pretrain", "tinny", "--dry-run"]) == 1
    assert "recipe 'tinny' is not known; did you mean 'tiny'?" in capsys.readouterr().err
