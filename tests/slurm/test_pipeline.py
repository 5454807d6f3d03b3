"""`slurm/pipeline.sh` from raw files to an exported folder, with training interrupted twice and resumed on other numbers of nodes."""

import json
import time
from pathlib import Path

import pytest

from megamm.config import to_dict
from tests.support.recipes import write_recipe
from tests.support.runs import WORDS, recipe_over
from tests.support.shards import jpeg
from tests.support.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.integration, pytest.mark.timeout(1500)]

CHECKOUT = Path(__file__).resolve().parents[2]
NUM_STEPS = 40


class Chain:
    """Raw files, a recipe over what they become, and the pipeline's jobs by name."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        _write_raw_files(folder / "raw")
        datasets = ('--data.train={pictures={shards="pictures/train-*.tar"}, texts={shards="texts/train-*.tar"}}', "--telemetry.every=1")
        recipe = recipe_over(folder / "data", *datasets, f"--train.steps={NUM_STEPS}")
        self.recipe = write_recipe(folder / "small.toml", to_dict(recipe))

    def submit(self, *words: str) -> list[tuple[int, str]]:
        """Submit with pipeline.sh; number and stage of each job."""
        # The cluster's commands start in /.
        program = ("env", f"--chdir={self.folder}", str(CHECKOUT / "slurm" / "pipeline.sh"))
        result = self.cluster.run(*program, *words, env={"MEGAMM_PREFLIGHT": "0"})
        return [(int(line.split()[0]), line.split()[1]) for line in result.stdout.splitlines()]

    def wait_for_steps(self, count: int) -> None:
        end = time.monotonic() + 400
        while self.num_steps() < count:
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def num_steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def scales(self) -> list[int]:
        """Number of ranks of each start."""
        lines = map(json.loads, (self.run / "data_positions.jsonl").read_text().splitlines())
        return [line["scale"]["world_size"] for line in lines if "scale" in line]

    def logs(self) -> str:
        files = [*self.folder.glob("*.out"), *sorted((self.run / "logs").glob("*.log"))]
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in files)


def _write_raw_files(raw: Path) -> None:
    for number in range(40):
        word = WORDS[number % 10]
        picture = raw / "pictures" / word / f"{number}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(jpeg(8 + number % 5, 8 + number % 3, seed=number))
        text = raw / "texts" / f"{number}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text(f"the word {word} is a digit, and so is {WORDS[number % 7]}\n" * (1 + number % 3))


def test_raw_files_become_an_export(cluster: Cluster, tmp_path: Path):
    chain = Chain(cluster, tmp_path)
    raw, data, export, one = tmp_path / "raw", tmp_path / "data", tmp_path / "export", ("--cpus-per-task=1", "--mem=1000")
    ranks = ("--gpus-per-node=2", "--cpus-per-gpu=1", "--mem=1000")
    two = ("--nodes=1-2", *ranks)
    jobs = chain.submit(
        *(*one, "--array=0-1", "prepare", "image_folder", f"{raw}/pictures", "--output", f"{data}/pictures"),
        *("--test-share", "0.2", "--max-samples-per-shard", "5", "--"),
        *(*one, "--array=0-1", "prepare", "text", f"{raw}/texts", "--output", f"{data}/texts", "--max-samples-per-shard", "10", "--"),
        *(*one, "tokenize", str(chain.recipe), "--"),
        *(*two, "pretrain", str(chain.recipe), "--run", str(chain.run), "--"),
        *(*ranks, "evaluate", str(chain.run), "--"),
        *(*one, "export", str(chain.run), "--output", str(export)),
    )
    assert [stage for _, stage in jobs] == ["prepare", "prepare", "tokenize", "pretrain", "evaluate", "export"]
    (pretrain,) = [number for number, stage in jobs if stage == "pretrain"]

    # The time limit comes near, and when the job could start again somebody has one of the nodes.
    chain.wait_for_steps(8)
    cluster.run("scancel", "--signal=USR1", "--batch", str(pretrain))
    cluster.wait_for(pretrain, "PENDING", "COMPLETED", "FAILED")
    other = cluster.submit("--nodes=1", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1000")
    cluster.wait_for(other, "RUNNING")
    # It comes near again, and the node is free again.
    chain.wait_for_steps(chain.num_steps() + 8)
    cluster.run("scancel", "--signal=USR1", "--batch", str(pretrain))
    cluster.wait_for(pretrain, "PENDING", "COMPLETED", "FAILED")
    cluster.run("scancel", str(other))
    waiting = {stage: cluster.job(number) for number, stage in jobs[4:]}
    assert {job["JobState"] for job in waiting.values()} == {"PENDING"}, waiting

    for number, stage in jobs:
        job = cluster.wait_for(number, "COMPLETED", "FAILED", "CANCELLED", timeout=400)
        assert job["JobState"] == "COMPLETED", (stage, chain.logs())
    assert cluster.job(pretrain)["Restarts"] == "2"
    assert chain.scales() == [4, 2, 4]
    steps = [line for line in map(json.loads, (chain.run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert json.loads((chain.run / "evaluation" / "report.json").read_text())
    assert json.loads((export / "parity.json").read_text())["holds"]
