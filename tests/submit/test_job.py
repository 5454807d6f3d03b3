"""What a request comes to: options, environment, command line."""

import sys

import pytest

from megamm.core.errors import ConfigError
from megamm.submit.options import option_in


def test_a_task_a_gpu_whoever_says_how_many(plan, tmp_path, monkeypatch):
    assert plan().world_sizes == range(4, 5, 2)
    site = tmp_path / "site.env"
    site.write_text("SBATCH_GPUS_PER_NODE=h100:4\nSBATCH_PARTITION=gpu\n")
    monkeypatch.setenv("MEGAMM_SITE", str(site))
    planned = plan(sbatch=("--nodes=2-3",))
    assert list(planned.world_sizes) == [8, 12]
    # What somebody says comes last, where it wins.
    assert plan(sbatch=("--ntasks-per-node=1",)).options.num_tasks_a_node == 1


def test_the_job_runs_the_snapshot_with_the_site_of_now(plan, tmp_path, monkeypatch):
    monkeypatch.delenv("MEGAMM_VENV", raising=False)
    site = tmp_path / "my site.env"
    site.write_text('SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-ours}\nMEGAMM_MODULES="cuda gcc"\nTWO="a\nb"\n')
    monkeypatch.setenv("MEGAMM_SITE", str(site))
    home = tmp_path / "snapshot"
    environment = plan().environment(home)
    assert environment == {
        "SBATCH_ACCOUNT": "ours",
        "MEGAMM_MODULES": "cuda gcc",
        "TWO": "a\nb",
        "MEGAMM_HOME": str(home),
        "MEGAMM_VENV": sys.prefix,
        "MEGAMM_SITE": str(home / "slurm" / "site.env"),
    }
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    assert "SBATCH_ACCOUNT" not in plan().environment(home)
    # A container has its own Python.
    monkeypatch.setenv("MEGAMM_CONTAINER", "image.sif")
    assert "MEGAMM_VENV" not in plan().environment(home)


def test_the_command_line_to_the_letter(plan, tmp_path):
    planned = plan("--optim.lr", "1e-3", arguments=("--resume", "never"), run=tmp_path / "100%")
    command = planned.command(tmp_path / "home", "r.toml")
    assert command == [
        *["sbatch", "--parsable", "--job-name=100%", f"--output={tmp_path}/100%%/logs/job-%j.out"],
        *["--nodes=2", "--gpus-per-node=2", f"{tmp_path}/home/slurm/pretrain.sh", "r.toml", "--run", f"{tmp_path}/100%"],
        *["--resume", "never", "--optim.lr", "1e-3"],
    ]
    assert planned.command(tmp_path / "home", "r.toml", test=True)[1] == "--test-only"


def test_where_variables_are_not_passed_on_ours_are_named(plan, monkeypatch):
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    assert option_in(plan().options.words, "export") == "MEGAMM_HOME,MEGAMM_VENV,MEGAMM_SITE"
    monkeypatch.setenv("SBATCH_EXPORT", "ALL,MORE=1")
    assert option_in(plan().options.words, "export") is None


def test_a_site_that_bash_cannot_read_and_one_that_is_not_there(plan, tmp_path, monkeypatch):
    site = tmp_path / "site.env"
    monkeypatch.setenv("MEGAMM_SITE", str(site))
    with pytest.raises(ConfigError, match="is not a file"):
        plan()
    site.write_text('SBATCH_PARTITION="gpu\n')
    with pytest.raises(ConfigError, match=r"cannot be read by bash: .*unexpected EOF"):
        plan()
    site.write_text("no_such_command\n")
    with pytest.raises(ConfigError, match="no_such_command: command not found"):
        plan()


def test_a_recipe_that_is_not_valid_is_told_before_anything_else(plan):
    with pytest.raises(ConfigError, match=r"optim\.lrr"):
        plan("--optim.lrr", "1e-3")
