import os
import signal

from megamm.train.interruption import StopRequest


def test_signals_are_remembered_and_handlers_given_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(tmp_path / "STOP") as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_stop_file_asks_too(tmp_path):
    with StopRequest(tmp_path / "STOP") as stop:
        (tmp_path / "STOP").touch()
        assert stop.requested and stop.reason == "STOP file"
