import os
import signal

import pytest

from megamm.train.interruption import StopRequest, wants_restart


def test_signals_are_remembered_and_handlers_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(tmp_path / "STOP") as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is before


def test_stop_file_asks_too(tmp_path):
    with StopRequest(tmp_path / "STOP") as stop:
        (tmp_path / "STOP").touch()
        assert stop.reason == "STOP file"


def test_a_stop_file_that_cannot_be_looked_for_is_none(tmp_path):
    unreadable = tmp_path / ("s" * 300)
    with pytest.raises(OSError, match="File name too long"):
        unreadable.exists()
    with StopRequest(unreadable) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


@pytest.fixture
def heard():
    """SIGINT as a terminal's programs have it; tests that run in the background inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_the_first_interrupt_asks_and_the_second_ends(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt), StopRequest(tmp_path / "STOP") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        assert "press Ctrl-C again" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path):
    """A shell has its background jobs, and a launcher its ranks, ignore what the terminal sends to all processes."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path / "STOP") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.reason is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_time_that_is_over_asks_and_a_stop_file_comes_first(tmp_path):
    assert StopRequest(tmp_path / "STOP", max_seconds=1000).reason is None
    over = StopRequest(tmp_path / "STOP", max_seconds=1e-9)
    assert over.reason == "max_seconds"
    (tmp_path / "STOP").touch()
    assert over.reason == "STOP file"


def test_a_step_is_reached_by_every_later_one(tmp_path):
    stop = StopRequest(tmp_path / "STOP", stop_after=6)
    assert [step for step in range(10) if stop.is_reached(step)] == [6, 7, 8, 9]
    assert stop.reason is None
    assert not any(StopRequest(tmp_path / "STOP").is_reached(step) for step in range(10))


def test_a_scheduler_ends_runs_that_are_to_be_started_again_and_people_do_not():
    again = {"SIGTERM", "SIGUSR1", "time limit of job 12"}
    rest = {"SIGINT", "STOP file", "stop_after", "max_seconds"}
    assert {reason for reason in again | rest if wants_restart(reason)} == again
