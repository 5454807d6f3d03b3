"""Where a drill is held: data, a recipe, a nursery of ranks, and runs in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.drills.engine import recipe
from benchmarks.drills.engine.jobs import ForkedJob, Job, LaunchedJob, Stuck
from benchmarks.drills.engine.nursery import Nursery
from tests.support.ranks import free_port

NUM_RANKS = 2
_QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Ground:
    """Starts runs of the drills' recipe; a context manager. State: the nursery, and how many jobs there were.

    Args:
        folder: For everything that is written.
        overrides: Of the recipe, for every run.
    """

    def __init__(self, folder: Path, *overrides: str):
        self.folder = folder
        self._overrides = overrides
        self._nursery = Nursery()
        self._num_jobs = 0

    def __enter__(self) -> Ground:
        recipe.write(self.folder)
        self._nursery.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._nursery.__exit__(*exception)

    def fork(
        self,
        run: str,
        *overrides: str,
        num_ranks: int = NUM_RANKS,
        fault: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ForkedJob:
        """Start `megamm pretrain` on ranks of the nursery, with a fault of `rank.FAULTS` in them or none."""
        common = {**(environment or {}), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        return ForkedJob(self._nursery, ranks, self._words(run, overrides), folder=self.folder, log=self._log(run), fault=fault)

    def launch(self, run: str, *overrides: str, num_ranks: int = NUM_RANKS, environment: Mapping[str, str] | None = None) -> LaunchedJob:
        """Start `launchers/local.sh NUM megamm pretrain` as a user does."""
        words = self._words(run, overrides)
        return LaunchedJob(num_ranks, words, folder=self.folder, log=self._log(run), environment=_QUIET | (environment or {}))

    def train(self, run: str, *overrides: str, **options: Any) -> None:
        """Fork ranks and wait for their end in order.

        Raises:
            Stuck: They ended otherwise.
        """
        with self.fork(run, *overrides, **options) as job:
            end_in_order(job)

    def path(self, run: str) -> Path:
        """The folder of a run."""
        return self.folder / run

    def _words(self, run: str, overrides: tuple[str, ...]) -> list[str]:
        return ["pretrain", recipe.RECIPE, "--run", run, *self._overrides, *overrides]

    def _log(self, run: str) -> Path:
        self._num_jobs += 1
        return self.folder / f"{run}-{self._num_jobs}.log"


def end_in_order(job: Job) -> None:
    """Wait for a job that must end with 0. It may have as many steps to train as the run it is held against; one that hangs ends itself.

    Raises:
        Stuck: It did not.
    """
    statuses = job.wait(timeout_seconds=3600.0)
    if any(statuses):
        raise Stuck(f"ended with {statuses}: {job.last_words()}")
