import time

import pytest

from megamm.core.errors import ConfigError, DataError, UnreachableData, may_pass
from megamm.engine import distributed
from tests.support.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.distributed


FAILURES = (DataError("shard 7 is cut"), UnreachableData("no answer"), OSError("disk full"))


def use_every_collective():
    world = distributed.start()
    distributed.barrier()
    found = {
        "world": [world.rank, world.local_rank, world.size, str(world.device), world.backend, world.is_main],
        "sum": distributed.all_reduce_sum([0.1, float(world.rank + 1)]),
        "agree": [distributed.agree(False), distributed.agree(world.rank == 1), distributed.agree(True)],
        "gather": distributed.gather_json({"rank": world.rank, "text": "ä" * 10**world.rank}),
        "broadcast": distributed.broadcast_json(["from", world.rank]),
        "failures": [one_fails(world.rank, error) for error in (*FAILURES, None)],
    }
    distributed.stop()
    return found


def one_fails(rank, error):
    try:
        with distributed.fail_together():
            if rank == 1 and error is not None:
                raise error
    except Exception as caught:
        return [type(caught).__name__, str(caught), may_pass(caught)]
    return None


def hang_on_rank_1():
    if distributed.start().rank == 0:
        distributed.barrier()
    else:
        time.sleep(60)


def fail_on_rank_1():
    if distributed.start().rank == 1:
        raise ValueError("only here")
    distributed.barrier()


@pytest.fixture(scope="module")
def found():
    return run_ranks(use_every_collective, 2)


def test_each_rank_knows_its_place(found):
    assert found[0]["world"] == [0, 0, 2, "cpu", "gloo", True]
    assert found[1]["world"] == [1, 1, 2, "cpu", "gloo", False]


def test_sums_are_float64_and_equal(found):
    assert found[0]["sum"] == found[1]["sum"] == [0.2, 3.0]


def test_one_true_makes_all_true(found):
    assert found[0]["agree"] == found[1]["agree"] == [False, True, True]


def test_json_of_any_length_is_gathered_in_order(found):
    assert found[0]["gather"] == found[1]["gather"] == [{"rank": 0, "text": "ä"}, {"rank": 1, "text": "ä" * 10}]


def test_rank_0_speaks_for_all(found):
    assert found[0]["broadcast"] == found[1]["broadcast"] == ["from", 0]


def test_an_error_of_one_rank_is_an_error_of_all(found):
    data, unreachable = ["DataError", "shard 7 is cut", False], ["UnreachableData", "no answer", True]
    assert found[0]["failures"] == [data, unreachable, ["MegaMMError", "rank 1 failed with OSError: disk full", True], None]
    assert found[1]["failures"] == [data, unreachable, ["OSError", "disk full", True], None]


def test_the_watchdog_ends_ranks_that_hang():
    with pytest.raises(RanksFailed, match="they hang"):
        run_ranks(hang_on_rank_1, 2, timeout_seconds=6)


def test_a_failing_rank_fails_the_test_with_its_output():
    with pytest.raises(RanksFailed, match="only here"):
        run_ranks(fail_on_rank_1, 2)


def test_a_world_of_one_needs_no_launcher_and_starts_again(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    for _ in range(2):
        world = distributed.start()
        assert (world.rank, world.size, distributed.gather_json("x")) == (0, 1, ["x"])
        distributed.stop()


def test_a_launcher_that_forgot_the_address_is_told(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT not set for WORLD_SIZE=2"):
        distributed.start()
