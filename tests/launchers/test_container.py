"""The words that `MEGAMM_CONTAINER` puts around a step. Neither apptainer nor pyxis can be had here, so programs of the test's own stand
for them and for `srun`, and say what they were called with."""

import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show hostnames") echo node0 ;;
    "show node") echo "NodeName=node0 NodeAddr=127.0.0.1" ;;
    "show config") echo "TaskPlugin              = task/affinity,task/cgroup"; seq 50000 ;;
    "show job") echo "JobId=77 JobState=RUNNING ExcNodeList=(null)" ;;
esac
"""
# Slurm's programs say much, more than a pipe holds. srun takes its own options, then the command; that runs, so that what is inside is
# seen as well.
SRUN = """#!/bin/bash
if [ "$1" = --help ]; then echo "$HELP"; seq 50000; exit; fi
while [[ $1 == -* ]]; do echo "srun $1"; shift; done
exec "$@"
"""
APPTAINER = """#!/bin/bash
echo "apptainer $1 $2 $3"
[ "$3" = --bind ] && tr , '\\n' <<<"$4" | sed 's/^/mount /'
echo "folder $6"
echo "image $7"
shift 7
exec "$@"
"""


class Job:
    """A batch job of `evaluate.sh` in a folder with stand-ins for Slurm's programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._programs = folder / "programs"
        self._programs.mkdir()
        self.program("scontrol", SCONTROL)
        self.program("srun", SRUN)
        self.program("megamm", '#!/bin/sh\necho "megamm $*"\n')

    def program(self, name: str, text: str) -> None:
        path = self._programs / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self._programs}:/usr/bin:/bin",
            "MEGAMM_HOME": str(CHECKOUT),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "node0",
            "SLURM_JOB_NUM_NODES": "1",
            **variables,
        }
        words = [str(CHECKOUT / "slurm" / "evaluate.sh"), "runs/a"]
        return subprocess.run(words, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_without_a_container_nothing_stands_between(job: Job):
    lines = job.run().stdout.splitlines()
    assert lines[-1] == "megamm evaluate runs/a"
    assert "srun --cpu-bind=cores" in lines
    assert not any("container" in line for line in lines)


def test_apptainer_runs_a_sif(job: Job):
    job.program("apptainer", APPTAINER)
    scratch = job.folder / "scratch"
    scratch.mkdir()
    variables = {"MEGAMM_CONTAINER": "/images/megamm.sif", "MEGAMM_CONTAINER_MOUNTS": "/data:/data", "MEGAMM_SCRATCH": str(scratch)}
    result = job.run(**variables)
    lines = result.stdout.splitlines()
    assert {"apptainer exec --nv --bind", f"folder {job.folder}", "image /images/megamm.sif"} <= set(lines), result
    mounts = [line.partition(" ")[2] for line in lines if line.startswith("mount ")]
    assert mounts == [f"{CHECKOUT}:{CHECKOUT}", f"{job.folder}:{job.folder}", f"{scratch}:{scratch}", "/data:/data"]
    assert lines[-1] == "megamm evaluate runs/a"


def test_pyxis_gets_an_image_where_srun_has_it(job: Job):
    lines = job.run(MEGAMM_CONTAINER="registry/megamm:1", HELP="      --container-image=[USER@][REGISTRY#]IMAGE").stdout.splitlines()
    home, folder = CHECKOUT, job.folder
    expected = {
        "srun --container-image=registry/megamm:1",
        f"srun --container-mounts={home}:{home},{folder}:{folder}",
        f"srun --container-workdir={folder}",
    }
    assert expected <= set(lines)
    assert lines[-1] == "megamm evaluate runs/a"


def test_a_container_that_cannot_be_run_is_refused(job: Job):
    for image, needs in (("megamm.sqsh", "needs pyxis"), ("megamm.sif", "needs apptainer")):
        result = job.run(MEGAMM_CONTAINER=image)
        assert result.returncode == 2 and needs in result.stderr, result


def test_modules_are_loaded_first(job: Job):
    (job.folder / "site.env").write_text('MEGAMM_MODULES="cuda/13.0 gcc"\nmodule() { echo "module $*"; }\n')
    assert job.run(MEGAMM_SITE=str(job.folder / "site.env")).stdout.splitlines()[0] == "module load cuda/13.0 gcc"


def test_a_site_that_is_not_there_is_refused(job: Job):
    result = job.run(MEGAMM_SITE="/nowhere/site.env")
    assert result.returncode == 2 and "MEGAMM_SITE=/nowhere/site.env is not there" in result.stderr


def test_the_example_of_a_site_can_be_read_as_it_is(job: Job):
    assert job.run(MEGAMM_SITE=str(CHECKOUT / "slurm" / "site.env.example")).stdout.splitlines()[-1] == "megamm evaluate runs/a"


def test_a_checkout_that_is_not_there_is_named(job: Job):
    result = job.run(MEGAMM_HOME="/nowhere")
    assert result.returncode == 2 and "/nowhere/slurm/common.sh" in result.stderr
