"""A small run on a test cluster: submitted as users submit, watched through the files that it writes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.checkpoint.fence import newest_owner, starts
from megamm.config import to_dict
from megamm.core.json_lines import read_json_lines
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over
from tests.support.slurm.cluster import Cluster

CHECKOUT = Path(__file__).resolve().parents[3]
SCRIPT = CHECKOUT / "slurm" / "pretrain.sh"
NUM_STEPS = 16
SAVE_EVERY = 4
PATIENCE_SECONDS = 300.0
_WORDS = ("--cpus-per-gpu=1", "--mem=4000", "--time=30", "--signal=B:USR1@10")
_RECIPE = (
    f"--train.steps={NUM_STEPS}",
    f"--checkpoint.every={SAVE_EVERY}",
    # Every state that an event leaves can be looked at.
    "--checkpoint.keep_last=100",
    "--batch.global_rows=8",
    "--batch.micro_rows=2",
    "--telemetry.tensorboard=false",
    "--telemetry.stall_seconds=60",
    "--train.stop_margin_seconds=20",
)


class TooSlow(Exception):
    """Something that had to happen did not, within all patience."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Poll until `condition()` is true, and return it.

    Raises:
        TooSlow: It is not by then.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TooSlow(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
    return value


@dataclass(frozen=True)
class Material:
    """Data and recipe of all runs, made once.

    Attributes:
        folder: Where they lie; visible on all nodes, as a shared file system is.
        recipe: A file.
    """

    folder: Path
    recipe: Path

    @classmethod
    def make(cls, folder: Path) -> Material:
        """Write shards, tokenizer and recipe."""
        make_data(folder / "data")
        recipe = recipe_over(folder / "data", *_RECIPE)
        return cls(folder, write_recipe(folder / "small.toml", to_dict(recipe)))


class Training:
    """One job that trains in one run folder.

    Attributes:
        cluster: Where.
        run: The run folder.
        job: The job's number.
    """

    def __init__(self, cluster: Cluster, material: Material, run: Path, *words: str):
        """Submit `slurm/pretrain.sh`; `words` are options of sbatch: nodes, tasks and GPUs a node at least."""
        self.cluster, self.run = cluster, run
        settings = {"MEGAMM_HOME": str(CHECKOUT), "MEGAMM_VENV": sys.prefix, "MEGAMM_PREFLIGHT": "0", "OMP_NUM_THREADS": "1"}
        place = (f"--chdir={material.folder}", f"--output={run.parent}/{run.name}-%j.out")
        command = (*_WORDS, *words, *place, str(SCRIPT), str(material.recipe), "--run", str(run))
        self.job = cluster.submit(*command, env=settings)

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """The lines of trained steps in metrics.jsonl, by step."""
        return {line["step"]: line for line in read_json_lines(self.run / "metrics.jsonl") if "loss" in line}

    def wait_for_step(self, step: int) -> None:
        """Return when the run has trained `step`."""
        self.wait(lambda: max(self.steps, default=0) >= step, f"step {step}")

    def ranks(self) -> dict[int, int]:
        """Rank -> process, as this machine numbers it."""
        return self.cluster.tasks(self.job, "pretrain")

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks, or to all."""
        for rank, pid in self.ranks().items():
            if rank in ranks or not ranks:
                os.kill(pid, number)

    def state(self) -> dict[str, str]:
        """What Slurm says of the job; {} while the controller does not answer."""
        try:
            return self.cluster.job(self.job)
        except RuntimeError:
            return {}

    def next_start(self, owner: int) -> int | None:
        """The step at which somebody after the run's `owner` went on; None where nobody did yet."""
        return next((step for number, step in starts(self.run) if number > owner), None)

    def owner(self) -> int:
        """Number of the run's present owner."""
        return newest_owner(self.run)

    def wait_for_restart(self, num: int = 1) -> None:
        """Return when the job was put back into the queue."""
        self.wait(lambda: int(self.state().get("Restarts", 0)) >= num, f"restart {num} of the job")

    def wait_for_end(self) -> str:
        """The job's state in the end and how often it was restarted, as `COMPLETED, 1 restart`."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.state().get("JobState") in final, "the job's end")
        job = self.cluster.job(self.job)
        num = int(job["Restarts"])
        return f"{job['JobState']}, {num} restart{'' if num == 1 else 's'}"

    def words(self) -> str:
        """The last words of the job and its ranks, for whoever looks into a failure."""
        files = [*self.run.parent.glob(f"{self.run.name}-{self.job}.out"), *sorted((self.run / "logs").glob("job*.log"))]
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in files)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """`wait_until`, with the last words of the job where it does not come."""
        try:
            return wait_until(condition, what)
        except TooSlow as error:
            raise TooSlow(f"{error}; the job is {self.state()}\n{self.words()}") from None
