"""The checks with real tasks on this machine, which pretend to be of several nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import pytest

from megamm.config import to_dict
from megamm.core.env import RankInfo
from megamm.core.files import read_json
from megamm.preflight.run import preflight
from tests.support.http_server import FileServer
from tests.support.ranks import free_port
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over

pytestmark = [pytest.mark.distributed, pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_data(root, num_each=6)
    return write_recipe(root / "small.toml", to_dict(recipe_over(root)))


def check(
    folder: Path,
    recipe_file: Path,
    ranks: dict[int, tuple[str, ...]],
    *,
    world_size: int,
    timeout_seconds: int = 60,
    scratch: Mapping[int, Path] = MappingProxyType({}),
):
    """Run the tasks `ranks` (rank -> further words) of a job with one task a node; their exit codes and output, by rank."""
    port = free_port()
    words = [sys.executable, "-m", "megamm.cli", "preflight", str(recipe_file), "--output", str(folder / "preflight.json")]
    settings = ("--run", str(folder / "run"), "--preflight.link_mib", "1", "--preflight.write_mib", "1")
    # Tasks of this test share two cores with each other and whatever else runs.
    shares = (
        "--preflight.min_speed_share",
        "0",
        "--preflight.min_link_share",
        "0",
        "--preflight.min_link_mib_per_second",
        "0",
        "--preflight.min_write_mib_per_second",
        "0",
    )
    limit = ("--preflight.timeout_seconds", str(timeout_seconds))
    tasks = {}
    for rank, more in ranks.items():
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "SLURMD_NODENAME": f"node{rank}"}
        environment = (
            os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        )
        if rank in scratch:
            environment["MEGAMM_SCRATCH"] = str(scratch[rank])
        command = [*words, *settings, *shares, *limit, *more]
        tasks[rank] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    outputs = {rank: task.communicate(timeout=280)[0] for rank, task in tasks.items()}
    return {rank: task.returncode for rank, task in tasks.items()}, outputs


def test_equal_nodes_are_measured_and_may_train(tmp_path, recipe_file):
    codes, outputs = check(tmp_path, recipe_file, dict.fromkeys(range(3), ()), world_size=3)
    assert set(codes.values()) == {0}, outputs
    report = read_json(tmp_path / "preflight.json")
    assert report["bad_nodes"] == {} and report["problems"] == []
    assert set(report["links"]) == {"node0+node1", "node0+node2", "node1+node2", "all"}
    assert all(result["bytes_per_second"] > 0 for result in report["links"].values())
    assert all(abs(seconds) < 5 for seconds in report["clocks"].values()) and len(report["clocks"]) == 3
    table = outputs[0].splitlines()
    assert table[0].split()[:2] == ["node", "GPUs"] and sum(line.endswith("well") for line in table) == 3
    # One disk, so one node after the other wrote it; the first one to come there has signed it.
    (signed,) = {one["shared"]["run_disk"] for one in report["ranks"].values()}
    assert signed in report["clocks"] and all(one["run_disk"]["write_mib_per_second"] > 0 for one in report["ranks"].values())
    # Nothing is left where it measured.
    assert not (tmp_path / "run").exists() and [path.name for path in tmp_path.iterdir()] == ["preflight.json"]


def test_a_node_with_another_recipe_and_one_without_data_and_disks_are_named(tmp_path, recipe_file):
    elsewhere = tmp_path / "unmounted"
    elsewhere.mkdir()
    changed = {
        0: (),
        1: ("--optim.lr", "0.5"),
        2: (),
        3: (),
        4: ("--data.train.texts.shards", "nothing-*.tar", "--run", f"{elsewhere}/run"),
    }
    codes, outputs = check(tmp_path, recipe_file, changed, world_size=5, scratch={4: tmp_path / "no-disk"})
    assert set(codes.values()) == {1}, outputs
    bad = read_json(tmp_path / "preflight.json")["bad_nodes"]
    assert set(bad) == {"node1", "node4"}
    assert any(reason.startswith("recipe is") for reason in bad["node1"])
    assert any("no shard matches" in reason for reason in bad["node4"])
    assert any("its run folder is not the one that 4 of 5 nodes see" in reason for reason in bad["node4"])
    assert (
        f"MEGAMM_SCRATCH={tmp_path}/no-disk is no folder; make it on every node, or name another folder in the site's settings"
        in bad["node4"]
    )
    assert "megamm: these nodes should not train (node1, node4)" in outputs[0]
    assert not outputs[2].strip(), "one task speaks for all"


def test_a_task_that_does_not_come_is_named_in_time(tmp_path, recipe_file):
    codes, outputs = check(tmp_path, recipe_file, {0: (), 1: ()}, world_size=3, timeout_seconds=30)
    assert set(codes.values()) == {1}, outputs
    report = read_json(tmp_path / "preflight.json")
    # Without a scheduler nobody knows what its node is called.
    assert report["bad_nodes"] == {"the node of rank 2": ["1 of its tasks did not come within 30 s"]}


def test_where_the_first_node_is_missing_the_others_say_so(tmp_path, recipe_file):
    codes, outputs = check(tmp_path, recipe_file, {1: (), 2: ()}, world_size=3, timeout_seconds=3)
    assert set(codes.values()) == {1}, outputs
    ((node, reasons),) = read_json(tmp_path / "preflight.json")["bad_nodes"].items()
    assert node == "127.0.0.1"
    assert all("does not answer within 3 s" in output for output in outputs.values())
    assert "does not answer within 3 s" in reasons[0]


NUM_SHARDS = 128


def test_a_first_node_that_fetches_indexes_for_long_is_at_work(tmp_path, monkeypatch):
    """All indexes take much longer than a node may be silent, each of them much less."""
    make_data(tmp_path, num_each=6)
    shard = tmp_path / "texts" / "train-00000.tar"
    for number in range(1, NUM_SHARDS):
        for file in (shard, shard.with_name(f"{shard.name}.index")):
            shutil.copy(file, tmp_path / "texts" / file.name.replace("00000", f"{number:05d}"))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with FileServer(tmp_path) as server:
        server.delay_seconds = 0.25
        texts = f"{server.url}/texts/train-{{00000..{NUM_SHARDS - 1:05d}}}.tar"
        recipe = recipe_over(tmp_path, f"--data.train.texts.shards={texts}", "--preflight.timeout_seconds=4", "--preflight.write_mib=1")
        reports = [tmp_path / "report", tmp_path / "unused"]

        def task(rank):
            return preflight(recipe, tmp_path / "run", RankInfo(rank=rank, local_rank=rank, world_size=2), reports[rank])

        start = time.monotonic()
        with ThreadPoolExecutor(2) as threads:
            first, second = threads.map(task, range(2))
        seconds = time.monotonic() - start
    assert first == second and first.may_train, first
    assert seconds > 1.25 * recipe.preflight.timeout_seconds, "too fast to tell"
