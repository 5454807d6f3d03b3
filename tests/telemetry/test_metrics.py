import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamm.config import Telemetry
from megamm.telemetry.metrics import MetricsLog, read_metrics


def test_resuming_drops_what_a_crash_wrote_past_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path, Telemetry(tensorboard=False), resumed_step=0, recipe={})
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLog(tmp_path, Telemetry(tensorboard=False), resumed_step=3, recipe={})
    log.write(4, {"loss": 40.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_numbers_reach_tensorboard_and_not_a_number_stays_readable(tmp_path):
    log = MetricsLog(tmp_path, Telemetry(), resumed_step=0, recipe={})
    log.write(1, {"loss": 2.5, "sample_keys": "ab"})
    log.write(2, {"loss": float("nan")})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("loss")[0].value == 2.5
    assert events.Tags()["scalars"] == ["loss"]
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2.5, "nan"]


def test_wandb_offline_gets_the_same_numbers(tmp_path, monkeypatch):
    import pytest

    pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricsLog(tmp_path, Telemetry(tensorboard=False, wandb=True), resumed_step=0, recipe={"name": "tiny"})
    log.write(1, {"loss": 2.5})
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
