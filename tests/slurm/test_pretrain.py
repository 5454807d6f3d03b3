"""Ten steps on two nodes with two tasks each, started by `sbatch slurm/pretrain.sh` and by the launchers for machines without Slurm."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megamm.config import to_dict
from megamm.core.json_lines import read_json_lines
from tests.support import ssh
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over
from tests.support.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

CHECKOUT = Path(__file__).resolve().parents[2]
WORDS = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1", "--signal=B:USR1@5"]
NUM_STEPS = 10


class Material:
    """A recipe over small data, and what trains it in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        make_data(folder / "data")
        recipe = recipe_over(folder / "data", "--telemetry.every=1", f"--train.steps={NUM_STEPS}")
        self.recipe = write_recipe(folder / "small.toml", to_dict(recipe))

    def submit(self, run: Path, *words: str, **variables: str) -> int:
        """`sbatch slurm/pretrain.sh`; `words` are options of sbatch."""
        output = f"--output={run.parent}/{run.name}-%j.out"
        command = [*WORDS, output, *words, str(CHECKOUT / "slurm" / "pretrain.sh"), str(self.recipe), "--run", str(run)]
        return self.cluster.submit(*command, env={"MEGAMM_HOME": str(CHECKOUT), "MEGAMM_PREFLIGHT": "0", **variables})

    def launch(self, launcher: str, node: str, run: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A launcher of `launchers/` on a node."""
        environment = {"MEGAMM_VENV": sys.prefix, "PATH": f"{sys.prefix}/bin:/usr/bin:/bin", **variables}
        words = [str(CHECKOUT / "launchers" / launcher), "megamm", "pretrain", str(self.recipe), "--run", str(run)]
        return self.cluster.run(*words, node=node, env=environment, check=False, timeout=600)

    def losses(self, run: Path) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line}

    def logs(self, run: Path) -> str:
        files = [*self.folder.glob(f"{run.name}-*.out"), *sorted((run / "logs").glob("*"))]
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in files if path.is_file())


@pytest.fixture(scope="module")
def material(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(cluster, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def by_srun(material: Material) -> Path:
    """The run folder of a job that one task a GPU trained to the end."""
    run = material.folder / "srun"
    job = material.submit(run)
    assert material.cluster.wait_for(job, "COMPLETED", "FAILED", timeout=600)["JobState"] == "COMPLETED", material.logs(run)
    return run


def test_a_job_of_two_nodes_trains_to_the_end(material: Material, by_srun: Path):
    assert (by_srun / "DONE").is_file()
    assert list(material.losses(by_srun)) == list(range(1, NUM_STEPS + 1))
    assert json.loads((by_srun / "environment.json").read_text())["launcher"]["WORLD_SIZE"] == "4"
    names = {path.name.partition("-restart-")[2] for path in (by_srun / "logs").glob("job-*")}
    assert names == {"0.env", "0-task-0.log", "0-task-1.log", "0-task-2.log", "0-task-3.log"}


def test_torchrun_trains_the_same_steps(material: Material, by_srun: Path):
    run, nodes = material.folder / "torchrun", material.cluster.nodes
    variables = {"NUM_NODES": "2", "GPUS": "2", "MASTER_ADDR": nodes[0], "CUDA_VISIBLE_DEVICES": ""}
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda node: material.launch("torchrun.sh", node, run, **variables), nodes))
    assert [result.returncode for result in results] == [0, 0], results
    assert material.losses(run) == material.losses(by_srun)


def test_deepspeed_trains_the_same_steps(material: Material, by_srun: Path, tmp_path: Path):
    ssh.install()
    if reason := ssh.missing():
        pytest.skip(reason)
    ssh.serve(material.cluster, tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\n" + "".join(f"{node} slots=2\n" for node in material.cluster.nodes))
    run = material.folder / "deepspeed"
    result = material.launch("deepspeed.sh", material.cluster.nodes[0], run, HOSTFILE=str(hosts), DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result
    assert material.losses(run) == material.losses(by_srun)
