import contextlib
import io
import json
import logging

import numpy as np
import pytest
import soundfile
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamm.config import Telemetry
from megamm.core.json_lines import read_json_lines
from megamm.telemetry.metrics import MetricsLog, Picture, Sound


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
    assert [(line["step"], line["loss"]) for line in read_json_lines(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


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


def test_pictures_sounds_and_words_reach_tensorboard(tmp_path):
    log = MetricsLog(tmp_path, Telemetry(), resumed_step=0, recipe={})
    pixels = np.zeros((3, 4, 3), dtype=np.uint8)
    pixels[1, 2] = (255, 128, 0)
    assert log.shows
    log.show(7, "sheet", Picture(pixels))
    log.show(7, "voice", Sound(np.array([0.0, 0.5, -2.0], dtype=np.float32), 8000))
    log.show(7, "said", "| a | b |")
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (picture,), (sound,), (words,) = events.Images("sheet"), events.Audio("voice"), events.Tensors("said/text_summary")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), pixels)
    wave, rate_hz = soundfile.read(io.BytesIO(sound.encoded_audio_string))
    # What is louder than full scale is cut.
    assert rate_hz == 8000 and wave == pytest.approx([0, 0.5, -1], abs=1e-3)
    assert words.tensor_proto.string_val == [b"| a | b |"] and {picture.step, sound.step, words.step} == {7}


def test_without_tensorboard_nothing_is_shown(tmp_path):
    log = MetricsLog(tmp_path, Telemetry(tensorboard=False), resumed_step=0, recipe={})
    assert not log.shows
    log.show(1, "said", "nothing")
    log.close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("resumed, kept", [(0, [1]), (1, [1, 2])])
def test_tensorboard_forgets_the_points_that_are_written_again(tmp_path, resumed, kept):
    log = MetricsLog(tmp_path, Telemetry(), resumed_step=0, recipe={})
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    log.close()
    log = MetricsLog(tmp_path, Telemetry(), resumed_step=resumed, recipe={})
    log.write(resumed + 1, {"loss": 2.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == kept
    assert events.Scalars("loss")[-1].value == 2.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_takes_no_events_costs_tensorboard_alone(tmp_path, caplog):
    log = MetricsLog(tmp_path, Telemetry(), resumed_step=0, recipe={})
    (events,) = (tmp_path / "tensorboard").iterdir()
    # The writer's thread may write its first events at this moment, and make the file anew.
    while not events.is_dir():
        events.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):
            events.mkdir()
    with caplog.at_level(logging.WARNING, "megamm"):
        for step in range(1, 200):
            log.write(step, {"loss": 1.0})
        log.close()
    assert caplog.text.count("TensorBoard gets no more numbers") == 1
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 199


def test_wandb_offline_gets_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = MetricsLog(tmp_path, Telemetry(tensorboard=False, wandb=True), resumed_step=0, recipe={"name": "tiny"})
    log.write(1, {"loss": 2.5})
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_runs_in_folders_of_one_name_have_their_own_wandb_run_and_keep_it(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is an extra")
    calls = []
    monkeypatch.setattr(wandb, "init", lambda **arguments: calls.append(arguments))
    config = Telemetry(tensorboard=False, wandb=True)
    for parent in ("one", "two", "one"):
        (tmp_path / parent / "tiny").mkdir(parents=True, exist_ok=True)
        MetricsLog(tmp_path / parent / "tiny", config, resumed_step=0, recipe={}).close()
    assert [call["name"] for call in calls] == ["tiny"] * 3
    assert calls[0]["id"] == calls[2]["id"] != calls[1]["id"]
    assert (tmp_path / "one" / "tiny" / "wandb_id.txt").read_text().strip() == calls[0]["id"]
