"""What the scripts of `slurm/` and a real Slurm make of each other; a stand-in for `megamm` says in milliseconds how its work ended."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.shards import jpeg
from tests.support.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SLURM = Path(__file__).resolve().parents[2] / "slurm"
ONE = ("--cpus-per-task=1", "--mem=500")
GPU = ("--nodes=1", "--gpus-per-node=1", "--cpus-per-gpu=1", "--mem=500")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Site:
    """A working folder, a stand-in program, and jobs that run it."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        (folder / "venv" / "bin").mkdir(parents=True)
        self.variables = {"MEGAMM_HOME": str(SLURM.parent), "RUN": str(self.run), "FOLDER": str(folder)}

    def program(self, text: str) -> None:
        """What `megamm` is: a bash script that sees the run folder as $RUN."""
        path = self.folder / "venv" / "bin" / "megamm"
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        self.variables["MEGAMM_VENV"] = str(self.folder / "venv")

    def sbatch(self, *words: str) -> int:
        """Submit a script of `slurm/` from the working folder; its output goes to `SCRIPT.out`."""
        name = next(word for word in words if word.endswith(".sh"))
        before = words[: words.index(name)]
        after = words[words.index(name) + 1 :]
        command = (*before, f"--chdir={self.folder}", f"--output={self.folder}/{name}.out", str(SLURM / name), *after)
        return self.cluster.submit(*command, env=self.variables)

    def pipeline(self, *words: str) -> list[int]:
        """The jobs that `pipeline.sh` submits."""
        command = ("env", f"--chdir={self.folder}", str(SLURM / "pipeline.sh"), *words)
        return [int(line.split()[0]) for line in self.cluster.run(*command, env=self.variables).stdout.splitlines()]

    def ends(self, *jobs: int) -> list[str]:
        """The states in which the jobs end."""
        return [self.cluster.wait_for(job, *ENDED, timeout=120)["JobState"] for job in jobs]

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    yield Site(cluster, tmp_path)
    cluster.run("scancel", "--user=root")
    cluster.wait_until_idle()


# Each subcommand notes its words. Training is interrupted at its first start and done at its second.
TRAINS = """
echo "$SLURM_JOB_ID $*" >>"$FOLDER/calls"
[ "$1" = pretrain ] || exit 0
if [ "${SLURM_RESTART_COUNT:-0}" -lt 1 ]; then
    echo '{"reason": "SIGUSR1", "requeue": true, "step": 5}' >"$RUN/INTERRUPTED"
else
    touch "$RUN/DONE"
fi
"""


def test_what_waits_for_a_job_goes_on_waiting_when_that_is_requeued(site: Site):
    site.program(TRAINS)
    settings = site.folder / "site.env"
    settings.write_text("SBATCH_PARTITION=${SBATCH_PARTITION:-graceful}\n")
    site.variables["MEGAMM_SITE"] = str(settings)
    run = str(site.run)
    stages = (*GPU, "pretrain", "tiny", "--run", run, "--optim.lr", "2e-4", "--", *GPU, "evaluate", run, "--", *ONE, "export", run)
    jobs = site.pipeline(*stages, "--output", f"{site.folder}/out")
    assert site.cluster.job(jobs[0])["Partition"] == "graceful"
    site.cluster.wait_for(jobs[1], "PENDING")
    assert site.ends(*jobs) == ["COMPLETED"] * 3
    assert site.cluster.job(jobs[0])["Restarts"] == "1"
    pretrain = f"{jobs[0]} pretrain tiny --run {run} --optim.lr 2e-4"
    assert site.read("calls").splitlines() == [
        *(pretrain, pretrain, f"{jobs[1]} evaluate {run}"),
        f"{jobs[2]} export {run} --output {site.folder}/out",
    ]


def test_what_waits_for_a_run_that_was_told_to_rest_is_cancelled(site: Site):
    site.program("""echo '{"reason": "STOP file", "requeue": false, "step": 5}' >"$RUN/INTERRUPTED" """)
    run = str(site.run)
    jobs = site.pipeline(*GPU, "pretrain", "tiny", "--run", run, "--", *GPU, "evaluate", run)
    assert site.ends(*jobs) == ["FAILED", "CANCELLED"]
    assert site.cluster.job(jobs[0])["ExitCode"] == "75:0"


def test_a_pipeline_that_slurm_would_not_take_is_not_begun(site: Site):
    before = site.cluster.run("squeue", "--noheader").stdout
    with pytest.raises(RuntimeError, match=r"evaluate: .*invalid partition"):
        site.pipeline(*ONE, "prepare", "digits", "--output", "data", "--", *GPU, "--partition=nowhere", "evaluate", "run")
    with pytest.raises(RuntimeError, match="no stage in 'evalaute run'; usage"):
        site.pipeline("evalaute", "run")
    assert site.cluster.run("squeue", "--noheader").stdout == before


def test_a_cancelled_job_stays_cancelled(site: Site):
    site.program("""
touch "$FOLDER/up"
trap 'echo "{\\"reason\\": \\"SIGTERM\\", \\"requeue\\": true, \\"step\\": 5}" >"$RUN/INTERRUPTED"; exit 0' TERM USR1
while :; do sleep 0.1; done""")
    job = site.sbatch(*GPU, "pretrain.sh", "tiny", "--run", str(site.run))
    while not (site.folder / "up").exists():
        time.sleep(0.05)
    site.cluster.run("scancel", str(job))
    assert site.ends(job) == ["CANCELLED"]
    site.cluster.wait_until_idle()
    assert site.cluster.job(job)["JobState"] == "CANCELLED" and site.cluster.job(job)["Restarts"] == "0"


def test_only_the_part_that_failed_is_prepared_again(site: Site):
    site.variables["MEGAMM_VENV"] = sys.prefix
    raw, output = site.folder / "raw", site.folder / "shards"
    for number in range(8):
        picture = raw / f"class{number % 2}" / f"{number}.jpg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(jpeg(8, 8, seed=number))
    words = ("image_folder", str(raw), "--output", str(output), "--max-samples-per-shard", "2")
    stages = (*ONE, "--array=0-1%1", "prepare", *words, "--", *ONE, "tokenize", "tiny")
    prepare, tokenize = site.pipeline(*stages)
    site.cluster.run("scancel", f"{prepare}_1")
    assert site.ends(tokenize) == ["CANCELLED"]
    assert len(list(output.glob("train-*.tar"))) == 2

    (again,) = site.pipeline(*ONE, "--array=0-1", "prepare", *words)
    assert site.ends(again) == ["COMPLETED"]
    site.cluster.wait_until_idle()
    assert "part 0 of 2 is done" in site.read(f"megamm-prepare-{again}_0.out")
    assert "4 shards" in site.read(f"megamm-prepare-{again}_1.out")
    assert len(list(output.glob("train-*.tar"))) == 4

    # Parts by number: how many there are has to be said.
    refused = site.sbatch(*ONE, "--array=1", "prepare.sh", *words)
    assert site.ends(refused) == ["FAILED"]
    assert "set MEGAMM_PARTS" in site.read("prepare.sh.out")


# The first node of the cluster is bad, whoever asks; training on it fails.
CHECKS = """
case $1 in
    preflight)
        while [ "$1" != --output ]; do shift; done
        [ "$RANK" = 0 ] || { sleep 0.5; exit 0; }
        case ,$NODES, in
            *",$BAD,"*) echo "{\\"bad_nodes\\": {\\"$BAD\\": [\\"slow disk\\"]}}" >"$2"; exit 3 ;;
        esac
        echo '{"bad_nodes": {}}' >"$2" ;;
    pretrain) [ "$SLURMD_NODENAME" != "$BAD" ] && touch "$RUN/DONE" ;;
esac
"""


@pytest.mark.usefixtures("can_run_slurm")
def test_a_bad_node_is_named_and_left_out(tmp_path: Path):
    with Cluster(3) as cluster:
        site = Site(cluster, tmp_path)
        site.program('NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)\n' + CHECKS)
        bad = cluster.nodes[0]
        site.variables |= {"BAD": bad, "MEGAMM_PREFLIGHT": "1"}
        two = ("--nodes=2", *GPU[1:])
        # All three at first.
        job = site.sbatch("--nodes=2-3", *GPU[1:], "pretrain.sh", "tiny", "--run", str(site.run))
        assert site.ends(job) == ["COMPLETED"], site.read("pretrain.sh.out")
        job = cluster.job(job)
        assert (job["Restarts"], job["ExcNodeList"]) == ("1", bad)
        assert f"bad: {bad}; starting again without" in site.read("pretrain.sh.out")
        assert (site.run / "DONE").exists()

        # Without it there are too few, and Slurm would let the job wait for ever.
        three = site.sbatch("--nodes=3", *GPU[1:], "pretrain.sh", "tiny", "--run", str(tmp_path / "three"))
        assert site.ends(three) == ["FAILED"]
        assert cluster.job(three)["Restarts"] == "0" and f"not enough nodes without {bad}" in site.read("pretrain.sh.out")

        # Nor does a job go on without a node that it names itself.
        named = site.sbatch(*two, f"--nodelist={','.join(cluster.nodes[:2])}", "pretrain.sh", "tiny", "--run", str(tmp_path / "named"))
        assert site.ends(named) == ["FAILED"]
        assert cluster.job(named)["Restarts"] == "0" and site.read("pretrain.sh.out").count(f"not enough nodes without {bad}") == 2

        # The checks alone: they say so, and requeue nothing.
        checks = site.sbatch(*two, f"--nodelist={','.join(cluster.nodes[:2])}", "preflight.sh", "tiny")
        assert site.ends(checks) == ["FAILED"]
        assert f"bad: {bad};" in site.read("preflight.sh.out")

        # Where every node is bad the checks may be wrong: nothing is left out.
        one = site.sbatch(*GPU, f"--nodelist={bad}", "pretrain.sh", "tiny", "--run", str(tmp_path / "other"))
        assert site.ends(one) == ["FAILED"]
        assert cluster.job(one)["Restarts"] == "0" and "every node failed its checks" in site.read("pretrain.sh.out")


def test_a_step_that_is_killed_is_tried_again_and_one_that_fails_is_not(site: Site):
    site.program("""
echo "$*" >>"$FOLDER/calls"
[ "${SLURM_RESTART_COUNT:-0}" -lt 1 ] && kill -9 $$
exit 1""")
    job = site.sbatch(*GPU, "evaluate.sh", str(site.run))
    assert site.ends(job) == ["FAILED"]
    assert site.cluster.job(job)["Restarts"] == "1"
    assert site.read("calls") == f"evaluate {site.run}\n" * 2


def test_an_evaluation_is_shared_by_one_task_a_gpu(site: Site):
    site.program('echo "$RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*" >>"$FOLDER/calls.$RANK"')
    two = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1", "--mem=500")
    job = site.sbatch(*two, "evaluate.sh", str(site.run))
    assert site.ends(job) == ["COMPLETED"], site.read("evaluate.sh.out")
    said = [site.read(f"calls.{rank}") for rank in range(4)]
    (where,) = {line.partition(" at ")[2] for line in said}
    assert where.endswith(f": evaluate {site.run}\n")
    assert [line.partition(" at ")[0] for line in said] == [f"{rank} of 4" for rank in range(4)]
