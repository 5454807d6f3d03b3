import dataclasses

import pytest

from megamm.core.errors import CheckpointError, ConfigError, DataError, UnreachableData
from megamm.data.ledger import BudgetSpent
from megamm.telemetry.failures import FailureLog, last_failure, read_failures
from megamm.telemetry.whereabouts import Whereabouts, Who


@dataclasses.dataclass
class Sample:
    dataset: str
    shard: str
    key: str
    micro_step: int
    row: int


SAMPLES = [Sample("speech", "train-00003.tar", "s017", 0, 1), Sample("images", "train-00001.tar", "p4", 1, 0)]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").touch()
    return tmp_path


def fail(run, error, *, rank=1, start=3, ignored=(), samples=lambda: SAMPLES):
    where = Whereabouts()
    where.enter("train", 12, samples)
    log = FailureLog(run, Who(start, rank, 4, "123", 2), where, ignored=ignored)
    with pytest.raises(type(error)), log:
        raise error
    return log


def test_a_record_says_who_where_what_and_with_which_samples(run, capfd):
    fail(run, RuntimeError("CUDA error:\n  unspecified"))
    (path,) = (run / "errors").iterdir()
    assert path.name == "start_00003.rank_00001.json"
    (record,) = read_failures(run)
    facts = {name: record[name] for name in ("start", "rank", "world_size", "job_id", "restart_count", "step", "phase", "kind", "message")}
    assert facts == {
        "start": 3,
        "rank": 1,
        "world_size": 4,
        "job_id": "123",
        "restart_count": 2,
        "step": 12,
        "phase": "train",
        "kind": "RuntimeError",
        "message": "CUDA error: unspecified",
    }
    assert record["samples"] == [dataclasses.asdict(sample) for sample in SAMPLES]
    assert "Traceback" in record["traceback"] and "Traceback" in capfd.readouterr().err


def test_nothing_hides_the_error_where_nothing_can_be_written(run, capfd):
    (run / "errors").write_text("a file in the way, as a full disk is")

    def unknown():
        raise OSError("the index is gone")

    fail(run, RuntimeError("boom"), samples=unknown)
    said = capfd.readouterr().err
    assert "RuntimeError: boom" in said and "was not written" in said and "the index is gone" in said


def test_the_first_exception_is_the_cause_whatever_closing_raises(run):
    where = Whereabouts()
    log = FailureLog(run, Who(1, 0, 1), where)
    with pytest.raises(OSError, match="No space"), log:
        try:
            with log:
                raise RuntimeError("the cause")
        finally:
            raise OSError("No space left on device")
    (record,) = read_failures(run)
    assert record["message"] == "the cause"


def test_of_ours_one_rank_tells_and_no_traceback_is_shown(run, capfd):
    error = DataError("samples are rotten")
    error.on_all_ranks = True
    fail(run, error, rank=1)
    assert read_failures(run) == []
    fail(run, error, rank=0)
    assert [record["rank"] for record in read_failures(run)] == [0]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "passes"),
    [(RuntimeError("CUDA error"), True), (UnreachableData("no answer"), True), (BudgetSpent("rotten"), False), (ConfigError("no"), False)],
)
def test_a_record_says_whether_another_start_may_work(run, error, passes):
    fail(run, error)
    assert [record["may_pass"] for record in read_failures(run)] == [passes]


def test_a_folder_that_is_no_run_or_no_longer_this_jobs_is_left_alone(tmp_path, run):
    fail(run, CheckpointError("taken over"), ignored=(CheckpointError,))
    (run / "config.json").unlink()
    fail(run, RuntimeError("boom"))
    assert list(run.iterdir()) == []


def test_a_keyboard_is_no_failure(run):
    with pytest.raises(KeyboardInterrupt), FailureLog(run, Who(1, 0, 1), Whereabouts()):
        raise KeyboardInterrupt
    assert read_failures(run) == []


def test_the_cause_is_told_from_its_consequences_and_older_records_stay(run, capfd):
    assert last_failure(run) is None
    fail(run, RuntimeError("old"), start=2)
    fail(run, RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.1]"), rank=0)
    fail(run, MemoryError("no memory"), rank=1)
    fail(run, RuntimeError("Connection reset by peer"), rank=2)
    (run / "errors" / "start_00009.rank_00000.json").write_text("{")
    assert [(one["start"], one["rank"]) for one in read_failures(run)] == [(2, 1), (3, 0), (3, 1), (3, 2)]
    last = last_failure(run)
    assert last is not None and last["kind"] == "MemoryError"
    # One line for a consequence, the whole story for a cause.
    said = capfd.readouterr().err
    assert said.count("Traceback") == 2 and "rank 0 lost another rank" in said
