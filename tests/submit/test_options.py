"""Which option wins, and what is no number of anything."""

import pytest

from megamm.core.errors import ConfigError
from megamm.submit.options import Options, option_in


def options(*words: str, directives: tuple[str, ...] = ("--nodes=3", "--gpus-per-node=8"), **environment: str) -> Options:
    return Options(words, environment, directives)


def test_every_way_to_write_an_option():
    for words in (["--nodes=4"], ["--nodes", "4"], ["-N4"], ["-N", "4"], ["-N=4"], ["-N", "2", "--nodes=4"]):
        assert option_in(words, "nodes") == "4", words
    assert option_in(["--nodes-more=4", "--ntasks-per-node=2", "-t", "1"], "nodes") is None


def test_command_line_before_environment_before_directives():
    assert options().num_gpus_a_node == 8
    assert options(SBATCH_GPUS_PER_NODE="a100:4").num_gpus_a_node == 4
    assert options("--gpus-per-node=2", SBATCH_GPUS_PER_NODE="4").num_gpus_a_node == 2
    assert options().num_nodes == (3, 3) and options("-N2-5").num_nodes == (2, 5)


@pytest.mark.parametrize("words", [["--nodes=many"], ["--nodes=0"], ["--nodes=5-2"], ["--nodes="], ["--nodes=99999999"]])
def test_nodes_that_are_no_number(words):
    if words == ["--nodes="]:
        # Empty is as if it were not said.
        assert options(*words).num_nodes == (1, 1)
        return
    with pytest.raises(ConfigError, match="is not a number of nodes"):
        _ = options(*words).num_nodes


def test_gpus_and_tasks_that_are_no_number():
    with pytest.raises(ConfigError, match="not a number of GPUs"):
        _ = options("--gpus-per-node=all").num_gpus_a_node
    with pytest.raises(ConfigError, match="not a number of tasks"):
        _ = options("--ntasks-per-node=0").num_tasks_a_node
