"""`megamm submit` as it is called, where there is no torch and no Slurm."""

import subprocess
import sys
from pathlib import Path

import pytest

from megamm.cli import main
from megamm.cli.submit import own_words
from tests.support.login_node import login_node


@pytest.mark.parametrize(
    ("words", "overrides", "own"),
    [
        ([], [], []),
        (["--resume", "never", "--accept-data-change"], [], ["--resume", "never", "--accept-data-change"]),
        (["--run", "a", "--optim.lr", "1e-3", "--max-seconds", "60"], ["--optim.lr", "1e-3"], ["--max-seconds", "60"]),
        (["--optim.lr=1e-3", "--run=a", "--exclude", "a"], ["--optim.lr=1e-3"], ["--exclude", "a"]),
    ],
)
def test_words_of_the_command_reach_the_job_as_they_were_said(words, overrides, own):
    assert own_words(words, overrides, without_run=True) == own


@pytest.fixture
def away(tmp_path: Path, tmp_path_factory, monkeypatch) -> Path:
    """An empty working folder, where a cluster's `sbatch` is there and its controller is not.

    (The real one looks for the controller in the network's name service for a minute where there is no slurm.conf.)
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEGAMM_SITE", raising=False)
    monkeypatch.setenv("PATH", f"{sbatch_alone(tmp_path_factory.mktemp('programs'))}:/usr/bin:/bin")
    return tmp_path


def sbatch_alone(folder: Path) -> Path:
    program = folder / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: no controller' >&2\nexit 1\n")
    program.chmod(0o755)
    return folder


SOURCE = {"prepare": ("text", "/raw"), "tokenize": ("tiny",), "preflight": ("tiny",), "evaluate": ("run",), "export": ("run",)}


@pytest.mark.parametrize("script", SOURCE)
def test_every_script_is_rehearsed_with_its_own_words(script: str, away: Path, capsys):
    output = ("--output", "out") if script in ("prepare", "export") else ()
    assert main(["submit", "slurm", script, *SOURCE[script], *output, "--time=5", "--dry-run"]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("megamm: nothing was submitted: ") and "problem  slurm " in told.out
    *_, command, _ = told.out.splitlines()
    words = command.split()
    kept = away / "jobs" / "snapshots" / "0001" / "slurm" / f"{script}.sh"
    assert words[0] == "sbatch" and "--time=5" in words and f"--job-name={script}" in words
    assert words[words.index(str(kept)) :] == [str(kept), *SOURCE[script], *output]
    assert list(away.iterdir()) == []


def test_a_finetuned_run_is_submitted_with_what_it_starts_from(away: Path, capsys):
    words = ["finetune", "runs/base", "tiny", "--run", "runs/tuned", "--optim.lr", "1e-3", "--stop-after", "7"]
    assert main(["submit", "slurm", *words, "--dry-run"]) == 1
    *_, command, _ = capsys.readouterr().out.splitlines()
    said = command.split()
    run = away / "runs" / "tuned"
    kept = run / "submissions" / "0001"
    own = ["--run", str(run), "--stop-after", "7", "--optim.lr", "1e-3"]
    assert said[said.index(str(kept / "slurm" / "finetune.sh")) :][:2] == [str(kept / "slurm" / "finetune.sh"), "runs/base"]
    assert said[-len(own) :] == own


def test_words_that_the_job_would_refuse_are_refused_here(capsys):
    assert main(["submit", "slurm", "pretrain", "--run", "tiny", "tiny"]) == 1
    assert "tiny comes first, as slurm/pretrain.sh takes it" in capsys.readouterr().err
    assert main(["submit", "slurm", "finetune", "--run", "a", "runs/base", "tiny"]) == 1
    assert "runs/base tiny comes first, as slurm/finetune.sh takes it" in capsys.readouterr().err
    assert main(["submit", "slurm", "pretrain", "tiny", "--exlude", "keys"]) == 1
    assert "did you mean 'exclude'?" in capsys.readouterr().err
    assert main(["submit", "slurm", "evaluate", "run", "--optim.lr", "1"]) == 1
    assert "'--optim.lr' is not an argument of `megamm evaluate`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["submit", "slurm", "export", "run"])
    assert "--output" in capsys.readouterr().err


def test_a_rehearsal_without_torch_and_slurm_tells_everything_and_writes_nothing(recipe: Path, tmp_path: Path):
    environment = login_node(tmp_path / "blocked") | {"PATH": f"{sbatch_alone(tmp_path)}:/usr/bin:/bin"}
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
