"""`sbatch slurm/pretrain.sh` on two nodes with two tasks each: the same engine, over the nodes' own network."""

import json
from pathlib import Path

import pytest

from megamm.config import to_dict
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over
from tests.support.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "pretrain.sh"
WORDS = ["--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--signal=B:USR1@5"]


class Training:
    """A recipe over small data, submitted to a cluster."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        make_data(folder / "data")
        self.recipe = write_recipe(folder / "small.toml", to_dict(recipe_over(folder / "data", "--telemetry.every=1")))

    def submit(self, run: Path, *overrides: str, words: tuple[str, ...] = ()) -> int:
        home = {"MEGAMM_HOME": str(SCRIPT.parents[1])}
        output = f"--output={run.parent}/{run.name}-%j.out"
        return self.cluster.submit(*WORDS, output, *words, str(SCRIPT), str(self.recipe), "--run", str(run), *overrides, env=home)

    def metrics(self, run: Path) -> list[dict]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [one for one in map(json.loads, lines) if "loss" in one]


@pytest.fixture(scope="module")
def training(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(cluster, tmp_path_factory.mktemp("slurm"))


def test_a_job_of_two_nodes_trains_to_the_end(training: Training):
    run = training.folder / "whole"
    job = training.submit(run, "--train.steps=4")
    assert training.cluster.wait_for(job, "COMPLETED", "FAILED", timeout=300)["JobState"] == "COMPLETED", _logs(training, run)
    assert (run / "DONE").is_file()
    assert [one["step"] for one in training.metrics(run)] == [1, 2, 3, 4]
    assert json.loads((run / "environment.json").read_text())["launcher"]["WORLD_SIZE"] == "4"


def _logs(training: Training, run: Path) -> str:
    files = [*training.folder.glob(f"{run.name}-*.out"), *sorted((run / "logs").glob("*"))]
    return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in files if path.is_file())
