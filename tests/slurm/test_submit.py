"""`megamm submit slurm` on a real Slurm: refused, rehearsed, queued, and run from its snapshot whatever becomes of the checkout."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from megamm.config import to_dict
from megamm.status.run_status import read_status
from megamm.submit.snapshot import PARTS
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over
from tests.support.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

CHECKOUT = Path(__file__).resolve().parents[2]


class Login:
    """A user's folder on the cluster: a checkout with the site's settings, data and a recipe."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.checkout, self.run = folder / "checkout", folder / "runs" / "small"
        for part in PARTS:
            shutil.copytree(CHECKOUT / part, self.checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        (self.checkout / "slurm" / "site.env").write_text(f"SBATCH_PARTITION=main\nMEGAMM_VENV={sys.prefix}\n")
        make_data(folder / "data")
        self.recipe = write_recipe(folder / "small.toml", to_dict(recipe_over(folder / "data", "--train.steps=3")))

    def megamm(self, *words: str):
        environment = {"PYTHONPATH": str(self.checkout)}
        return self.cluster.run(sys.executable, "-m", "megamm.cli", *words, env=environment, check=False, timeout=300)

    def submit(self, *words: str):
        own = ("--run", str(self.run), "--nodes=1", "--gpus-per-node=2", "--sbatch=--cpus-per-gpu=1 --hold")
        return self.megamm("submit", "slurm", "pretrain", str(self.recipe), *own, *words)

    def queue(self) -> list[str]:
        return self.cluster.run("squeue", "--noheader", "--format=%i").stdout.split()


@pytest.fixture(scope="module")
def login(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Login:
    return Login(cluster, tmp_path_factory.mktemp("submit"))


def test_a_rehearsal_says_what_would_run_and_leaves_nothing(login: Login):
    answer = login.submit("--dry-run", "--optim.lr", "5e-4")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    snapshot = login.run / "submissions" / "0001"
    for expected in (
        "1 node × 2 = 2 ranks; 6 rows a step in 1 micro-step × 3 rows a rank",
        "ok       slurm    Job ",
        "optim.lr: 0.002 -> 0.0005",
        "SBATCH_PARTITION=main",
        f"MEGAMM_HOME={snapshot}",
        f"{snapshot}/slurm/pretrain.sh {snapshot}/recipe.toml --run {login.run} --optim.lr 5e-4",
        "nothing was submitted",
    ):
        assert expected in answer.stdout, answer.stdout
    assert not login.run.exists() and not login.queue()


def test_slurm_would_take_the_other_scripts(login: Login):
    one = ("--sbatch=--cpus-per-task=1", "--dry-run")
    for words in (
        ("prepare", "text", "/raw", "--output", str(login.folder / "new"), "--sbatch=--array=0-3"),
        ("tokenize", str(login.recipe)),
    ):
        answer = login.megamm("submit", "slurm", *words, *one)
        assert answer.returncode == 0 and "ok       slurm    Job " in answer.stdout, answer.stdout + answer.stderr
        assert f"/jobs/snapshots/0001/slurm/{words[0]}.sh" in answer.stdout
    assert not Path("/jobs").exists() and not login.queue()


def test_what_slurm_would_refuse_is_not_submitted(login: Login):
    answer = login.submit("--sbatch=--nodes=9")
    assert answer.returncode == 1 and "problem  slurm    sbatch would refuse it: " in answer.stdout, answer.stdout
    assert answer.stderr == "megamm: nothing was submitted: 2 problems (see above)\n"
    assert not login.run.exists() and not login.queue()


def test_a_job_runs_its_snapshot_whatever_becomes_of_the_checkout(login: Login):
    answer = login.submit()
    assert answer.returncode == 0, answer.stdout + answer.stderr
    snapshot = login.run / "submissions" / "0001"
    record = json.loads((snapshot / "submission.json").read_text())
    assert login.queue() == [record["job_id"]] and f"submitted job {record['job_id']}" in answer.stdout
    told = json.loads(login.megamm("status", "--json", str(login.run)).stdout)
    assert told["state"] == "queued" and "JobHeldUser" in told["why"]
    again = login.submit()
    assert again.returncode == 1 and f"is queued (job {record['job_id']}" in again.stdout
    # Somebody goes on working.
    (login.checkout / "megamm" / "train" / "pretrain.py").write_text('raise RuntimeError("half an edit")\n')
    (login.checkout / "slurm" / "common.sh").write_text("exit 1\n")
    login.recipe.write_text("name = 'another'\n")
    login.cluster.run("scontrol", "release", record["job_id"])
    job = login.cluster.wait_for(int(record["job_id"]), "COMPLETED", "FAILED", "CANCELLED", timeout=600)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted((login.run / "logs").glob("job-*")))
    assert job["JobState"] == "COMPLETED", logs
    (status,) = read_status([login.run])
    assert status.state == "done" and status.facts.progress.step == 3 and status.facts.num_ranks == 2
    assert f"MEGAMM_HOME={snapshot}" in next((login.run / "logs").glob("*.env")).read_text()
