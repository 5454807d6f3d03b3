"""The checks of nodes on a real Slurm: a node behind a slow cable is found by what its partners see of it, and left out."""

import sys
from pathlib import Path

import pytest

from megamm.config import to_dict
from megamm.core.files import read_json
from megamm.core.json_lines import read_json_lines
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over
from tests.support.slurm.cluster import Cluster

CHECKOUT = Path(__file__).resolve().parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# Nodes share the cores of one machine, so their own speeds say nothing; cables differ by more than a hundred times.
SHARES = {
    "min_speed_share": 0,
    "min_write_mib_per_second": 0,
    "link_mib": 1,
    "write_mib": 1,
    "min_link_share": 0.05,
    "min_link_mib_per_second": 0,
    "timeout_seconds": 60,
}


@pytest.mark.slurm
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("can_run_slurm")
def test_a_node_behind_a_slow_cable_is_named_by_all_its_links(tmp_path: Path):
    make_data(tmp_path, num_each=6)
    recipe = recipe_over(tmp_path, *(f"--preflight.{name}={value}" for name, value in SHARES.items()))
    write_recipe(tmp_path / "small.toml", to_dict(recipe))
    with Cluster(3) as cluster:
        slow = cluster.nodes[1]
        device = cluster.run("ip", "-oneline", "route", "get", "10.77.0.1", node=slow).stdout.split(" dev ")[1].split()[0]
        cluster.run("tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", "8mbit", "burst", "16kb", "latency", "1s", node=slow)
        words = ("--nodes=3", "--gpus-per-node=1", "--cpus-per-gpu=1", "--mem=1500", f"--chdir={tmp_path}", f"--output={tmp_path}/out")
        script = (str(CHECKOUT / "slurm" / "preflight.sh"), str(tmp_path / "small.toml"), "--run", str(tmp_path / "run"))
        job = cluster.submit(*words, *script, env={"MEGAMM_HOME": str(CHECKOUT), "OMP_NUM_THREADS": "1"})
        state = cluster.wait_for(job, *ENDED, timeout=400)["JobState"]
        said = (tmp_path / "out").read_text()
        assert state == "FAILED" and f"bad: {slow};" in said, said
        report = read_json(tmp_path / f"preflight-{job}" / "logs" / "preflight.json")
    assert set(report["bad_nodes"]) == {slow}
    assert "MiB/s" in report["bad_nodes"][slow][0] and "and 1 more" in report["bad_nodes"][slow][0]
    assert set(report["clocks"]) == set(cluster.nodes)


# One node has no program.
PROGRAM = """#!/bin/bash
[ "$SLURMD_NODENAME" != {bad} ] || exit 127
exec {megamm} "$@"
"""


@pytest.mark.slurm
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("can_run_slurm")
def test_a_node_where_nothing_starts_is_left_out_and_the_others_train(tmp_path: Path):
    make_data(tmp_path, num_each=6)
    shares = SHARES | {"min_link_share": 0, "timeout_seconds": 30}
    recipe = recipe_over(
        tmp_path, *(f"--preflight.{name}={value}" for name, value in shares.items()), "--train.steps=2", "--schedule.warmup_steps=1"
    )
    write_recipe(tmp_path / "small.toml", to_dict(recipe))
    run, program = tmp_path / "run", tmp_path / "venv" / "bin" / "megamm"
    program.parent.mkdir(parents=True)
    with Cluster(3) as cluster:
        bad = cluster.nodes[1]
        program.write_text(PROGRAM.format(bad=bad, megamm=Path(sys.prefix) / "bin" / "megamm"))
        program.chmod(0o755)
        words = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-gpu=1", "--mem=3000", f"--chdir={tmp_path}", f"--output={tmp_path}/out")
        script = (str(CHECKOUT / "slurm" / "pretrain.sh"), str(tmp_path / "small.toml"), "--run", str(run))
        variables = {"MEGAMM_HOME": str(CHECKOUT), "MEGAMM_VENV": str(tmp_path / "venv"), "MEGAMM_SCRATCH": str(tmp_path / "scratch")}
        # Ranks in turn, as some sites have it by default: whose node is missing does not follow from its rank.
        job = cluster.submit(*words, *script, env={**variables, "OMP_NUM_THREADS": "1", "SLURM_DISTRIBUTION": "cyclic"})
        found = cluster.wait_for(job, *ENDED, timeout=500)
        said = (tmp_path / "out").read_text()
    assert (found["JobState"], found["Restarts"], found["ExcNodeList"]) == ("COMPLETED", "1", bad), said
    assert f"bad: {bad}; starting again without" in said
    assert (run / "DONE").is_file() and [line["step"] for line in read_json_lines(run / "metrics.jsonl") if "loss" in line] == [1, 2]
    # The checks of the start that trained, on the others.
    report = read_json(run / "logs" / "preflight.json")
    assert report["bad_nodes"] == {} and {one["node"] for one in report["ranks"].values()} == {*cluster.nodes} - {bad}
    assert (tmp_path / "scratch").is_dir()
