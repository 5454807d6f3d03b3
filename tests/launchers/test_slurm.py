"""How slurm/pretrain.sh ends, with programs of the test's own in place of `srun` and `scontrol`."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).resolve().parents[2] / "slurm" / "pretrain.sh")

SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show hostnames") echo node0 ;;
    "show node") echo "NodeName=node0 NodeAddr=127.0.0.1 NodeHostName=node0" ;;
    "show job") echo "JobState=$JOB_STATE Reason=None" ;;
    requeue*) echo "$2" >>"$RUN/requeued" ;;
esac
"""


class Job:
    """A batch job whose `srun` is the given shell script; it sees the run folder as $RUN."""

    def __init__(self, folder: Path):
        self.run = folder / "run"
        self.run.mkdir()
        self._programs = folder / "programs"
        self._programs.mkdir()
        self._program("scontrol", SCONTROL)

    def _program(self, name: str, text: str) -> None:
        path = self._programs / name
        path.write_text(text)
        path.chmod(0o755)

    def start(self, srun: str, *, restart: int = 0, state: str = "RUNNING") -> subprocess.Popen:
        self._program("srun", f"#!/bin/bash\n{srun}\n")
        variables = {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "MEGAMM_REQUEUE_WAIT_S": "0",
            "SLURM_SUBMIT_DIR": str(self.run.parent),
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_JOB_ID": "77",
            "SLURM_RESTART_COUNT": str(restart),
            "JOB_STATE": state,
            "RUN": str(self.run),
        }
        return subprocess.Popen([SCRIPT, "tiny", "--run", str(self.run)], env=variables, stderr=subprocess.PIPE, text=True)

    def finish(self, srun: str, **options) -> tuple[int, str]:
        process = self.start(srun, **options)
        _, errors = process.communicate(timeout=20)
        return process.returncode, errors

    @property
    def num_requeues(self) -> int:
        path = self.run / "requeued"
        return len(path.read_text().split()) if path.exists() else 0


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def interrupted(reason: str) -> str:
    return f"""echo '{{"reason": "{reason}", "step": 5}}' >"$RUN/INTERRUPTED"; exit 1"""


def test_an_old_marker_does_not_requeue_a_run_that_fails(job):
    (job.run / "INTERRUPTED").write_text('{"reason": "SIGUSR1", "step": 5}\n')
    assert job.finish("exit 1")[0] == 75
    assert job.num_requeues == 0


def test_a_finished_run_ends_with_0_whatever_srun_says(job):
    assert job.finish('touch "$RUN/DONE"; exit 3')[0] == 0
    assert job.num_requeues == 0


@pytest.mark.parametrize("reason", ["SIGUSR1", "SIGTERM"])
def test_a_signal_requeues(job, reason):
    assert job.finish(interrupted(reason))[0] == 75
    assert job.num_requeues == 1


@pytest.mark.parametrize("reason", ["STOP file", "stop_after", "another rank"])
def test_a_run_that_was_told_to_rest_is_not_requeued(job, reason):
    assert job.finish(interrupted(reason))[0] == 75
    assert job.num_requeues == 0


def test_a_cancelled_job_stays_cancelled(job):
    assert job.finish(interrupted("SIGTERM"), state="COMPLETING")[0] == 75
    assert job.num_requeues == 0


def test_the_third_restart_without_a_checkpoint_gives_up(job):
    (job.run / "checkpoints" / "step_00000004").mkdir(parents=True)
    for restart in (0, 1):
        job.finish(interrupted("SIGUSR1"), restart=restart)
    assert job.num_requeues == 2
    code, errors = job.finish(interrupted("SIGUSR1"), restart=2)
    assert code == 75 and "step_00000004" in errors
    assert job.num_requeues == 2
    # Slurm itself may bring it back (a lost node): then nothing starts.
    code, errors = job.finish('touch "$RUN/started"', restart=3)
    assert code == 75 and "giving up" in errors
    assert not (job.run / "started").exists()


def test_a_checkpoint_or_a_new_submission_counts_from_the_start(job):
    for restart in range(5):
        job.finish(f'mkdir -p "$RUN/checkpoints/step_0000000{restart + 1}"; ' + interrupted("SIGUSR1"), restart=restart)
    assert job.num_requeues == 5
    for restart in (5, 6, 7):
        job.finish(interrupted("SIGUSR1"), restart=restart)
    assert job.num_requeues == 7
    job.finish(interrupted("SIGUSR1"), restart=0)
    assert job.num_requeues == 8


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_to_the_batch_shell_reach_srun_as_usr1(job, number):
    srun = f'end() {{ {interrupted("SIGUSR1")}; }}; trap end USR1; touch "$RUN/up"; while :; do sleep 0.05; done'
    process = job.start(srun)
    deadline = time.monotonic() + 20
    while not (job.run / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert job.num_requeues == 1
