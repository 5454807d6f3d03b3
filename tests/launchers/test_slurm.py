"""How slurm/pretrain.sh ends, with programs of the test's own in place of `srun` and `scontrol`."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = CHECKOUT / "slurm"

SCONTROL = """#!/bin/sh
away=$(cat "$RUN/away" 2>/dev/null)
case $away in
    "") ;;
    any | "$1") rm "$RUN/away"; echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1 ;;
esac
case "$1 $2" in
    "show hostnames") echo "$3" | tr , '\n' ;;
    "show node") echo "NodeName=node0 NodeAddr=127.0.0.1 NodeHostName=node0" ;;
    "show job") echo "JobId=$SLURM_JOB_ID JobState=$JOB_STATE Reason=None Restarts=$SLURM_RESTART_COUNT ExcNodeList=(null)" ;;
    requeue*)
        [ -z "$REFUSES" ] || { echo "Requested operation is presently disabled for job $2" >&2; exit 1; }
        echo "$2" >>"$RUN/requeued" ;;
    update*) echo "$3" >>"$RUN/updated" ;;
    release*) echo "$2" >>"$RUN/released" ;;
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

    def start(
        self,
        srun: str,
        *words: str,
        script: str = "pretrain.sh",
        restart: int = 0,
        state: str = "RUNNING",
        number: int = 77,
        **more: str,
    ) -> subprocess.Popen[str]:
        self._program("srun", f"#!/bin/bash\n{srun}\n")
        variables = {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "MEGAMM_REQUEUE_WAIT_S": "0",
            "MEGAMM_HOME": str(CHECKOUT),
            "SLURM_SUBMIT_DIR": str(self.run.parent),
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_ID": str(number),
            "SLURM_RESTART_COUNT": str(restart),
            "JOB_STATE": state,
            "RUN": str(self.run),
            **more,
        }
        return subprocess.Popen(
            [str(SCRIPTS / script), *(words or ("tiny", "--run", str(self.run)))],
            env=variables,
            cwd=self.run.parent,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, srun: str, *words: str, **options) -> tuple[int, str]:
        process = self.start(srun, *words, **options)
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors

    @property
    def num_requeues(self) -> int:
        path = self.run / "requeued"
        return len(path.read_text().split()) if path.exists() else 0


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def interrupted(reason: str = "SIGUSR1", *, requeue: bool = True) -> str:
    return f"""echo '{json.dumps({"reason": reason, "requeue": requeue, "step": 5})}' >"$RUN/INTERRUPTED"; exit 1"""


def test_an_old_marker_does_not_requeue_a_run_that_fails(job):
    (job.run / "INTERRUPTED").write_text('{"reason": "SIGUSR1", "requeue": true, "step": 5}\n')
    assert job.finish("exit 1")[0] == 75
    assert job.num_requeues == 0


def test_a_finished_run_ends_with_0_whatever_srun_says(job):
    assert job.finish('touch "$RUN/DONE"; exit 3')[0] == 0
    assert job.num_requeues == 0


def test_a_run_that_was_interrupted_is_requeued_where_it_says_so(job):
    assert job.finish(interrupted("STOP file", requeue=False))[0] == 75
    assert job.num_requeues == 0
    assert job.finish(interrupted("time limit of job 77"))[0] == 75
    assert job.num_requeues == 1


NEEDS_SOMEBODY = ("ConfigError", "DataError", "BudgetSpent")


def failed(start: int, *kinds: str) -> str:
    """What a start writes of the ranks that failed, before it ends."""
    records = [json.dumps({"kind": kind, "may_pass": kind not in NEEDS_SOMEBODY}) for kind in kinds]
    lines = [f"""echo '{record}' >"$RUN/errors/start_{start:05d}.rank_{rank:05d}.json";""" for rank, record in enumerate(records)]
    return f'mkdir -p "$RUN/errors"; {" ".join(lines)} exit 1'


def test_a_crash_and_a_kill_are_tried_again(job):
    assert job.finish(failed(1, "RuntimeError", "ZeroDivisionError"))[0] == 75
    assert job.num_requeues == 1
    # The record of an earlier crash says nothing of this start, which was refused.
    assert job.finish("exit 1", restart=1)[0] == 75
    assert job.num_requeues == 1
    assert job.finish("exit 137", number=78)[0] == 75
    assert job.num_requeues == 2


def test_what_only_somebody_can_mend_is_not_tried_again(job):
    assert job.finish(failed(1, "RuntimeError"))[0] == 75
    assert job.num_requeues == 1
    # The other rank's error follows from the first one's.
    assert job.finish(failed(2, "RuntimeError", "DataError"), restart=1)[0] == 75
    assert job.finish(failed(3, "BudgetSpent"), number=78)[0] == 75
    assert job.num_requeues == 1
    # A file server that is away comes back.
    assert job.finish(failed(4, "UnreachableData"), number=79)[0] == 75
    assert job.num_requeues == 2


def refused(number: int, *lines: str) -> str:
    """What tasks of a job print that are refused before the run begins; srun then kills the other tasks."""
    written = [f"""echo '{line}' >"$RUN/logs/job-{number}-restart-0-task-{task}.log";""" for task, line in enumerate(lines)]
    return f"{' '.join(written)} exit 143"


def test_a_task_that_is_refused_says_so_although_the_others_are_killed(job):
    said = "megamm (rank 1): schedule.warmup_steps=50 exceeds train.steps=5"
    assert job.finish(refused(77, "12:00:00 [rank 0] INFO megamm.train: begins", said))[0] == 75
    assert job.num_requeues == 0
    assert job.finish(refused(78, "megamm: shard http://x/0.tar: no answer [may pass]"), number=78)[0] == 75
    assert job.num_requeues == 1
    assert job.finish(refused(79, "12:00:00 [rank 0] INFO megamm.train: begins"), number=79)[0] == 75
    assert job.num_requeues == 2
    # All tasks may be through before srun kills one.
    by_itself = refused(80, "megamm: shard http://x/0.tar: no answer [may pass]").replace("exit 143", "exit 1")
    assert job.finish(by_itself, number=80)[0] == 75
    assert job.num_requeues == 3


def test_a_refusal_of_very_many_tasks_is_read_to_its_end(job):
    # More than a pipe takes at once: who reads it must not leave at the first line.
    said = f"megamm (rank $task): {200 * 'x'}"
    srun = f'for task in {{0..999}}; do echo "{said}" >"$RUN/logs/job-77-restart-0-task-$task.log"; done; exit 143'
    assert job.finish(srun)[0] == 75
    assert job.num_requeues == 0


def test_a_step_that_srun_cannot_make_is_tried_again(job):
    assert job.finish('exit "${SLURM_EXIT_ERROR:-1}"')[0] == 75
    assert job.num_requeues == 1


def test_a_cancelled_job_stays_cancelled(job):
    assert job.finish(interrupted("SIGTERM"), state="COMPLETING")[0] == 75
    assert job.num_requeues == 0


def test_a_controller_that_does_not_answer_is_asked_again(job):
    code, errors = job.finish('echo any >"$RUN/away"; ' + interrupted())
    assert code == 75 and job.num_requeues == 1
    assert "no requeue at attempt 1 (the controller says nothing)" in errors


@pytest.mark.parametrize("away", ["any", "requeuehold", "update", "release"])
def test_a_bad_node_is_left_out_although_the_controller_is_away_for_a_moment(job, away):
    report = """echo '{"bad_nodes": {"node1": ["slow"]}}' >"$RUN/logs/preflight.json"; """
    nodes = {"SLURM_JOB_NODELIST": "node0,node1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "main", "SLURM_CONF": "/dev/null"}
    code, errors = job.finish(report + f'echo {away} >"$RUN/away"; exit 1', **nodes)
    assert code == 75 and "bad: node1; starting again without" in errors
    assert job.num_requeues == 1 and not (job.run / "away").exists()
    assert [(job.run / name).read_text() for name in ("updated", "released")] == ["ExcNodeList=node1\n", "77\n"], errors


def test_a_controller_that_refuses_is_not_asked_again(job):
    code, errors = job.finish(interrupted(), REFUSES="yes")
    assert code == 75 and job.num_requeues == 0
    assert errors.count("does not requeue this job: Requested operation is presently disabled") == 1 and "attempt" not in errors


def test_checks_that_are_killed_are_tried_again_and_checks_that_are_refused_are_not(job):
    assert job.finish("exit 1", MEGAMM_PREFLIGHT="1")[0] == 75
    assert job.num_requeues == 0
    for restart in range(3):
        code, errors = job.finish("exit 137", MEGAMM_PREFLIGHT="1", restart=restart, number=78)
    assert code == 75 and job.num_requeues == 2 and "giving up" in errors


def test_the_third_restart_without_a_checkpoint_gives_up(job):
    (job.run / "checkpoints" / "step_00000004").mkdir(parents=True)
    for restart in (0, 1):
        job.finish(interrupted(), restart=restart)
    assert job.num_requeues == 2
    code, errors = job.finish(interrupted(), restart=2)
    assert code == 75 and "step_00000004" in errors
    assert job.num_requeues == 2
    # Slurm itself may bring it back (a lost node): then nothing starts.
    code, errors = job.finish('touch "$RUN/started"', restart=3)
    assert code == 75 and "giving up" in errors
    assert not (job.run / "started").exists()


def test_a_checkpoint_or_a_new_submission_counts_from_the_start(job):
    for restart in range(5):
        job.finish(f'mkdir -p "$RUN/checkpoints/step_0000000{restart + 1}"; ' + interrupted(), restart=restart)
    assert job.num_requeues == 5
    for restart in (5, 6, 7):
        job.finish(interrupted(), restart=restart)
    assert job.num_requeues == 7
    job.finish(interrupted(), number=78)
    assert job.num_requeues == 8


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_to_the_batch_shell_reach_srun_as_usr1(job, number):
    srun = f'end() {{ {interrupted()}; }}; trap end USR1; touch "$RUN/up"; while :; do sleep 0.05; done'
    process = job.start(srun)
    deadline = time.monotonic() + 120
    while not (job.run / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert job.num_requeues == 1


def test_the_environment_of_each_start_is_kept_without_secrets(job):
    secrets = {"HF_TOKEN": "aaa1", "WANDB_API_KEY": "aaa2", "MY_PASSWORD": "aaa3\naaa4", "http_proxy": "http://me:aaa5@proxy:3128"}
    job.finish("exit 1", restart=2, MEGAMM_SITE="", EXTRA="two words", **secrets)
    text = (job.run / "logs" / "job-77-restart-2.env").read_text()
    assert "aaa" not in text
    assert "EXTRA=two\\ words\n" in text and "http_proxy=http://***@proxy:3128\n" in text


def test_words_reach_the_run_and_its_folder_has_the_recipes_name(job):
    show = """printf '%s\\n' "${@:$#-4}" >words"""
    assert job.finish(show, "recipes/7b.toml", "--optim.lr", "2e-4", "two words")[0] == 75
    folder = job.run.parent
    assert (folder / "words").read_text().splitlines() == ["--optim.lr", "2e-4", "two words", "--run", f"{folder}/runs/7b"]


def test_an_option_in_the_place_of_the_recipe_is_refused(job):
    code, errors = job.finish('touch "$RUN/started"', "--run", str(job.run), "tiny")
    assert code == 2 and "the recipe comes first, not --run" in errors
    assert not (job.run / "started").exists() and not (job.run.parent / "runs").exists()


def test_a_run_that_starts_from_another_one_is_trained_and_requeued_like_any(job):
    words = ("runs/base", "tiny_lora", "--run", str(job.run), "--optim.lr", "2e-4")
    echo = 'printf "%s\n" "$@" >"$RUN/words"; '
    assert job.finish(echo + interrupted(), *words, script="finetune.sh")[0] == 75
    assert (job.run / "words").read_text().split()[-8:] == ["megamm", "finetune", *words]
    assert job.num_requeues == 1
    assert job.finish('touch "$RUN/DONE"', *words, script="finetune.sh", restart=1)[0] == 0
    for wrong in (("runs/base",), ("runs/base", "--run", str(job.run))):
        code, errors = job.finish("exit 0", *wrong, script="finetune.sh")
        assert code == 2 and "say what the run starts from and its recipe" in errors


def test_one_task_a_gpu_on_as_many_nodes_as_this_start_has(job):
    show = """printf '%s\\n' "$@" >"$RUN/words" """
    job.finish(show, SLURM_JOB_NUM_NODES="3", SLURM_GPUS_PER_NODE="a100:8", SLURM_NTASKS="16")
    words = (job.run / "words").read_text().splitlines()
    assert {"--nodes=3", "--ntasks=24", "--ntasks-per-node=8"} <= set(words)


def test_unequal_gpus_and_tasks_are_refused(job):
    code, errors = job.finish("exit 0", SLURM_GPUS_PER_NODE="a100:8", SLURM_NTASKS_PER_NODE="4")
    assert code == 2 and "--gpus-per-node=8 with --ntasks-per-node=4: one task a GPU" in errors
