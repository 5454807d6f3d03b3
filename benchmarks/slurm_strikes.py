"""The events of `benchmarks.slurm_events`: each is a function that does one thing to one run, and says what became of it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import psutil

from megamm.checkpoint.manifest import committed, read_manifest
from tests.support.slurm.cluster import Cluster
from tests.support.slurm.training import SAVE_EVERY, Material, Training, wait_until
from tests.support.slurm.unbroken import compare

STRIKE_STEP = SAVE_EVERY + 2
STOP_SECONDS = 15.0
"""Before a job's end: when the run is asked to leave, and by its own clock as well."""


@dataclass(frozen=True)
class Seen:
    """What became of a job and its run.

    Attributes:
        outcome: The job's state in the end and its restarts, and what else was to happen.
        resume_seconds: From the event to the first step that was trained after it; None where nothing was to resume.
        num_steps_again: Steps that were trained once more, because no checkpoint held them.
        num_wrong_samples: Samples lost or repeated; None where the run was not to be finished.
        num_unequal_tensors: Weights that are not those of an unbroken run, bit for bit; None at another number of ranks.
        loss_difference: Largest of a step, against the unbroken run.
    """

    outcome: str
    resume_seconds: float | None = None
    num_steps_again: int = 0
    num_wrong_samples: int | None = None
    num_unequal_tensors: int | None = None
    loss_difference: float | None = None


@dataclass
class Yard:
    """Where runs are made. State: the unbroken runs, made when they are first asked for, and how long they took to start.

    Attributes:
        folder: Of everything; visible on all nodes, as a shared file system is.
        num_tasks: Ranks a node, each with a GPU.
        start_seconds: Longest that an unbroken run took to its first step.
    """

    folder: Path
    num_tasks: int = 2
    start_seconds: float = 0.0

    @cached_property
    def material(self) -> Material:
        """Data and recipe."""
        return Material.make(self.folder)

    def unbroken(self, num_nodes: int) -> Path:
        """The run that nothing happened to, on so many nodes."""
        run = self.folder / f"unbroken-{num_nodes}"
        if not (run / "DONE").exists():
            with Cluster(num_nodes) as cluster:
                began = time.time()
                training = self.train(cluster, run, f"--nodes={num_nodes}")
                training.wait_for_step(1)
                self.start_seconds = max(self.start_seconds, time.time() - began)
                outcome = training.wait_for_end()
                assert outcome == "COMPLETED, 0 restarts", f"{outcome}\n{training.words()}"
        return run

    def train(self, cluster: Cluster, run: Path, *words: str) -> Training:
        """Submit a run."""
        return Training(cluster, self.material, run, f"--gpus-per-node={self.num_tasks}", *words)


class Strike:
    """One run up to where something happens to it, and after. State: when it was struck, at which step, who owned the run.

    Args:
        cluster: Where.
        yard: What is trained, and what it is held against.
        run: The run folder.
        words: Of sbatch; the first says how many nodes.
    """

    def __init__(self, cluster: Cluster, yard: Yard, run: Path, *words: str):
        self.cluster, self._yard, self._words = cluster, yard, words
        self.training = yard.train(cluster, run, *words)
        # Most nodes that the words allow: the run begins on as many.
        self._num_nodes = int(words[0].rpartition("=")[2].rpartition("-")[2])
        self._resumed: tuple[float | None, int] = (None, 0)

    def reach(self) -> Strike:
        """Train past the first checkpoint."""
        self.training.wait_for_step(STRIKE_STEP)
        wait_until(lambda: committed(self.training.run / "checkpoints"), "the first checkpoint")
        return self

    def now(self) -> None:
        """It happens now."""
        self._struck, self._owner = time.monotonic(), self.training.owner()

    def resumed(self) -> None:
        """Return when a step was trained after it."""
        reached, step = 0, None

        def has_gone_on() -> bool:
            nonlocal reached, step
            # Before the next one drops the lines of steps that no checkpoint holds.
            reached = max([reached, *self.training.steps])
            step = self.training.next_start(self._owner)
            return step is not None

        self.training.wait(has_gone_on, "another start")
        self.training.wait_for_step(step + 1)
        self._resumed = time.monotonic() - self._struck, max(0, reached - step)

    def submit_again(self) -> None:
        """As a user does, with the same words."""
        self.training = self._yard.train(self.cluster, self.training.run, *self._words)

    def finish(self, *, before: str = "", after: str = "") -> Seen:
        """Wait for the end and hold the run against the unbroken one; `before` and `after` stand beside the job's end."""
        outcome = "; ".join(filter(None, [before, self.training.wait_for_end(), after]))
        if not (self.training.run / "DONE").exists():
            raise AssertionError(f"the run is not done: {outcome}\n{self.training.words()}")
        difference = compare(self.training.run, self._yard.unbroken(self._num_nodes))
        is_same = int(self.training.state()["NumNodes"]) == self._num_nodes
        return Seen(outcome, *self._resumed, difference.num_samples, difference.num_tensors if is_same else None, difference.loss)


# --- events ---


def time_limit(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    yard.unbroken(2)
    # Long enough to start twice as slowly, or nothing would be trained before the time is up.
    minutes = 2 + int(2 * yard.start_seconds / 60)
    strike = Strike(cluster, yard, run, "--nodes=2", f"--time={minutes}").reach()
    end = datetime.fromisoformat(strike.training.state()["EndTime"]).timestamp()
    # A long step: the run must not be through before its time is up.
    strike.training.send(signal.SIGSTOP)
    time.sleep(max(0.0, end - STOP_SECONDS - time.time()))
    strike.now()
    strike.training.send(signal.SIGCONT)
    strike.resumed()
    return strike.finish()


def preemption_with_grace(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    return _preemption(cluster, yard, run, "graceful")


def preemption_without_grace(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    return _preemption(cluster, yard, run, "main")


def cancelled(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=2").reach()
    strike.now()
    cluster.run("scancel", str(strike.training.job))
    strike.training.wait_for_end()
    # Nobody is left who could bring it back.
    cluster.wait_until_idle(timeout=120)
    first = strike.training.wait_for_end()
    strike.submit_again()
    strike.resumed()
    return strike.finish(before=f"{first}; then anew")


def crash(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=2").reach()
    strike.now()
    strike.training.send(signal.SIGKILL, 1)
    strike.resumed()
    return strike.finish()


def hang(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=2").reach()
    strike.now()
    strike.training.send(signal.SIGSTOP, 1)
    strike.resumed()
    report = any((run / "errors").glob("*.stall.json"))
    return strike.finish(after="stall recorded" if report else "no stall recorded")


def power_off_with_a_spare_node(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=2").reach()
    lost = strike.training.state()["BatchHost"]
    strike.now()
    cluster.power_off(lost)
    strike.resumed()
    return strike.finish()


def power_off_without_one(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=1-2").reach()
    strike.now()
    cluster.power_off(_other(cluster, strike.training))
    strike.resumed()
    return strike.finish(after=_nodes(strike.training))


def partition(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=1-2").reach()
    lost = _other(cluster, strike.training)
    strike.now()
    cluster.unplug(lost)
    strike.resumed()
    seen = strike.finish(after=_nodes(strike.training))
    cluster.plug_in(lost)
    wait_until(lambda: not strike.training.ranks(), "the end of the ranks that were cut off")
    return seen


def cut_off_but_alive(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    """The whole job is behind the cut cable and trains on, while Slurm starts it again elsewhere."""
    strike = Strike(cluster, yard, run, "--nodes=1").reach()
    training, lost = strike.training, strike.training.state()["BatchHost"]
    left_behind = training.ranks()
    # So that it still has steps to train, and a checkpoint to commit, once the other one is under way.
    training.send(signal.SIGSTOP)
    strike.now()
    cluster.unplug(lost)
    strike.resumed()
    for pid in left_behind.values():
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not any(map(psutil.pid_exists, left_behind.values())), "the end of the ranks that were cut off")
    refused = any("taken over" in path.read_text(errors="replace") for path in (run / "logs").glob(f"job-{training.job}-restart-0-*"))
    seen = strike.finish(after="the old one's commit refused" if refused else "no commit was refused")
    later = {read_manifest(folder).fence.restart_count for step, folder in committed(run / "checkpoints") if step > STRIKE_STEP}
    assert later == {1}, f"checkpoints after the event are of restarts {later}"
    return seen


def controller_restart(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=2").reach()
    cluster.restart_controller()
    return strike.finish()


def no_progress(cluster: Cluster, yard: Yard, run: Path) -> Seen:
    training = yard.train(cluster, run, "--nodes=2")
    killed: set[int] = set()
    for start in range(3):
        training.wait_for_restart(start)
        # Other ranks of the start before may still be ending.
        wait_until(lambda: training.ranks().get(0, 0) not in {0, *killed}, f"rank 0 of start {start}")
        killed.add(training.ranks()[0])
        training.send(signal.SIGKILL, 0)
    outcome = training.wait_for_end()
    return Seen(f"{outcome}; gave up" if "giving up" in training.words() else outcome)


def _preemption(cluster: Cluster, yard: Yard, run: Path, partition: str) -> Seen:
    strike = Strike(cluster, yard, run, "--nodes=2", f"--partition={partition}").reach()
    strike.now()
    # Whoever is urgent has the nodes for as long as it takes until the run is back in the queue.
    leave = run.with_suffix(".urgent")
    wait = f"until [ -e {leave} ]; do sleep 0.1; done"
    cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap", wait)
    strike.training.wait_for_restart()
    leave.touch()
    strike.resumed()
    return strike.finish()


def _other(cluster: Cluster, training: Training) -> str:
    """The node of a job on two that its script does not run on."""
    return next(node for node in cluster.nodes if node != training.state()["BatchHost"])


def _nodes(training: Training) -> str:
    return f"on {training.state()['NumNodes']} node"
