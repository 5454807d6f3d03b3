"""What a real Slurm says of a job's end, before and after somebody gave the job more time."""

import sys
import time
from pathlib import Path

import pytest

from tests.support.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

CHECKOUT = Path(__file__).resolve().parents[2]
# Asks, waits until the limit was changed, and asks again; the zone is one in which dates would mislead.
_ASK = """
import os, time
from pathlib import Path
from megamm.train.time_limit import TimeLimit, slurm_end
job, folder = os.environ["SLURM_JOB_ID"], Path(os.environ["FOLDER"])
(folder / "before").write_text(f"{slurm_end(job)} {os.environ.get('SLURM_JOB_END_TIME')}")
while not (folder / "changed").exists():
    time.sleep(0.1)
(folder / "after").write_text(str(slurm_end(job)))
"""


def test_the_end_of_a_job_is_known_and_asked_for_again(cluster: Cluster, tmp_path: Path):
    (tmp_path / "ask.py").write_text(_ASK)
    words = ["--nodes=1", "--ntasks=1", "--time=10", f"--output={tmp_path}/out", "--wrap", f"srun {sys.executable} {tmp_path}/ask.py"]
    began = time.time()
    job = cluster.submit(*words, env={"PYTHONPATH": str(CHECKOUT), "FOLDER": str(tmp_path), "TZ": "Pacific/Kiritimati"})
    deadline = time.monotonic() + 120
    while not (tmp_path / "before").exists():
        assert time.monotonic() < deadline, (tmp_path / "out").read_text()
        time.sleep(0.1)
    asked, told = (tmp_path / "before").read_text().split()
    assert began + 590 <= float(asked) <= time.time() + 610
    # Where the environment says it nobody need ask.
    assert told == "None" or float(told) == float(asked)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    (tmp_path / "changed").touch()
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", (tmp_path / "out").read_text()
    assert float((tmp_path / "after").read_text()) == float(asked) + 600
