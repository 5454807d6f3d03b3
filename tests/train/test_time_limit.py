import time

import pytest

from megamm.checkpoint.saver import Committed
from megamm.telemetry.whereabouts import Whereabouts
from megamm.train.time_limit import TimeLimit


class Scheduler:
    """What `slurm_end` answers, one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self):
        return self.answers.pop(0)


def limit(ends_in, *later, margin=10.0, save_bytes=0):
    scheduler = Scheduler(*(None if one is None else time.time() + one for one in later))
    return TimeLimit("7", scheduler, margin_seconds=margin, save_bytes=save_bytes, end=time.time() + ends_in)


def committed(tmp_path, *, stall, commit):
    return Committed(step=1, folder=tmp_path, num_bytes=1, stall_seconds=stall, commit_seconds=commit)


def test_a_run_leaves_a_margin_before_the_end():
    assert limit(100).reason(Whereabouts()) is None
    assert limit(9, 9).reason(Whereabouts()) == "time limit of job 7"


def test_the_margin_grows_with_what_saves_took(tmp_path):
    one = limit(100, 100)
    one.saved(committed(tmp_path, stall=1, commit=30))
    assert one.reason(Whereabouts()) is None
    one.saved(committed(tmp_path, stall=1, commit=50))
    assert one.reason(Whereabouts()) == "time limit of job 7"


def test_before_the_first_save_its_size_is_reckoned_with():
    assert limit(100, save_bytes=1 << 30).reason(Whereabouts()) is None
    assert limit(100, 100, save_bytes=20 << 30).reason(Whereabouts()) == "time limit of job 7"


def test_the_margin_holds_another_step_and_an_evaluation(monkeypatch):
    where = Whereabouts()
    where.evaluation_seconds = 40
    assert limit(60).reason(where) is None
    monkeypatch.setattr(Whereabouts, "longest_step_seconds", property(lambda self: 15.0))
    assert limit(60, 60).reason(where) == "time limit of job 7"


def test_a_job_that_was_given_more_time_goes_on():
    one = limit(5, 500)
    assert one.reason(Whereabouts()) is None and one.reason(Whereabouts()) is None


def test_a_scheduler_that_does_not_answer_changes_nothing():
    assert limit(5, None).reason(Whereabouts()) == "time limit of job 7"
    assert TimeLimit("7", Scheduler(None), margin_seconds=10).reason(Whereabouts()) is None


@pytest.mark.parametrize("has_one", [False, True])
def test_the_environment_of_a_job_says_its_end(monkeypatch, has_one):
    monkeypatch.setenv("SLURM_JOB_ID", "7" if has_one else "")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 50) if has_one else "")
    monkeypatch.setenv("PATH", "")
    found = TimeLimit.of_environment(100.0, 0)
    assert (found is not None) == has_one
    if found is not None:
        # No scheduler answers here: what the environment said stays.
        assert found.reason(Whereabouts()) == "time limit of job 7"
