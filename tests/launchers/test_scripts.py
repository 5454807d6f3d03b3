import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*CHECKOUT.glob("launchers/*.sh"), *CHECKOUT.glob("slurm/*.sh"), CHECKOUT / ".ci" / "run"])
LOCAL = str(CHECKOUT / "launchers" / "local.sh")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_and_pass_shellcheck(script):
    assert os.access(script, os.X_OK)
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_every_rank_learns_who_it_is():
    result = subprocess.run([LOCAL, "3", "sh", "-c", "echo $RANK $LOCAL_RANK $WORLD_SIZE"], capture_output=True, text=True, check=True)
    assert sorted(result.stdout.split("\n")) == ["", "0 0 3", "1 1 3", "2 2 3"]


def test_a_failing_rank_ends_the_others_and_its_code_is_the_result():
    started = time.monotonic()
    result = subprocess.run([LOCAL, "2", "sh", "-c", "[ $RANK = 1 ] && exit 7; exec sleep 60"], capture_output=True, check=False)
    assert result.returncode == 7
    assert time.monotonic() - started < 30


def test_a_signal_reaches_every_rank(tmp_path):
    script = f"trap 'touch {tmp_path}/term-$RANK; exit 0' TERM; touch {tmp_path}/up-$RANK; while :; do sleep 0.1; done"
    process = subprocess.Popen([LOCAL, "2", "bash", "-c", script])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("up-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    assert sorted(path.name for path in tmp_path.glob("term-*")) == ["term-0", "term-1"]


def test_local_without_a_number_says_how_it_is_used():
    result = subprocess.run([LOCAL, "two", "true"], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "NUM_RANKS" in result.stderr


def test_scratch_is_where_temporary_files_go_and_refused_where_it_cannot_be(tmp_path):
    def start(scratch, *words):
        variables = os.environ | {"MEGAMM_SCRATCH": str(scratch), "SLURMD_NODENAME": "n3"}
        return subprocess.run([CHECKOUT / "launchers" / "node.sh", *words], env=variables, capture_output=True, text=True, check=False)

    tells = ("python3", "-c", "import tempfile; print(tempfile.gettempdir())")
    assert start(tmp_path / "mine", *tells).stdout == f"{tmp_path}/mine\n"
    # What lies above it may be a disk that is not mounted.
    refused = start(tmp_path / "disk" / "mine", *tells)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith(f"megamm: MEGAMM_SCRATCH={tmp_path}/disk/mine cannot be written on n3; make it on every node")
    # The checks say themselves what they find.
    assert start(tmp_path / "disk" / "mine", "echo", "preflight").stdout == "preflight\n"


def test_srun_variables_become_ranks():
    script = CHECKOUT / "launchers" / "node.sh"
    variables = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "PATH": os.environ["PATH"]}
    command = [str(script), "sh", "-c", "echo $RANK $LOCAL_RANK $WORLD_SIZE $OMP_NUM_THREADS"]
    assert subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout == "5 1 8 1\n"


@pytest.mark.parametrize(
    ("num_gpus", "visible", "expected"),
    [
        (1, None, "empty"),
        (2, None, "unset"),
        (0, None, "unset"),
        (4, "3", "empty"),
        (4, "3,1", "3,1"),
        (4, "1,9", "empty"),
        (4, "GPU-a,GPU-b", "GPU-a,GPU-b"),
        (4, "-1", "-1"),
        (4, "", "empty"),
    ],
)
def test_more_ranks_than_gpus_run_on_the_cpu(tmp_path, num_gpus, visible, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nfor i in $(seq {num_gpus}); do echo \"GPU $i: Some (UUID: GPU-$i)\"; echo '  MIG 1g Device 0:'; done\n")
    program.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    show = '[ -z "${CUDA_VISIBLE_DEVICES-x}" ] && echo empty || echo "${CUDA_VISIBLE_DEVICES-unset}"'
    result = subprocess.run([LOCAL, "2", "sh", "-c", show], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [expected] * 2
    assert result.stderr.count("run on the CPU") == (expected == "empty" and visible != "")
