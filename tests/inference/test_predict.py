import json

import numpy as np
import pytest
from PIL import Image

from megamm.cli import main
from megamm.core.errors import ConfigError
from megamm.core.masks import run_lengths
from megamm.core.predictions import Box, Instance
from megamm.inference.drawing import colours_of, draw_reply
from megamm.inference.predict import Prediction, Question, draw, predict, questions_of
from megamm.tasks.reply import Reply
from tests.support.shards import flac, jpeg
from tests.support.tiny_run import random_model, write_run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in {"a.jpg": jpeg(40, 30), "b.PNG": jpeg(30, 50, format="PNG"), "c.flac": flac(9000)}.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_every_file_gets_an_answer_in_order(files, tmp_path):
    loaded = random_model(tmp_path)
    asked = questions_of([files / "a.jpg", files / "c.flac", files / "b.PNG"], (), "What is this?")
    found = list(predict(loaded, "captioning", asked, batch_size=2, max_new_tokens=4))
    assert [one.question for one in found] == asked
    alone = list(predict(loaded, "captioning", asked[2:], max_new_tokens=4))
    assert alone[0].to_json() == found[2].to_json() | {"files": [str(files / "b.PNG")]}
    assert len({one.reply.text for one in found}) > 1


def test_what_cannot_be_asked_is_named(files, tmp_path):
    loaded = random_model(tmp_path)
    for task, message in (("guessing", "task 'guessing' is not known; the tasks are classification"), ("text", "use `megamm generate`")):
        with pytest.raises(ConfigError, match=message):
            list(predict(loaded, task, [Question(text="1")]))
    with pytest.raises(ConfigError, match="knows no items"):
        list(predict(loaded, "recommendation", [Question(text="1")]))
    with pytest.raises(ConfigError, match=r"gone\.jpg does not exist"):
        questions_of([files / "gone.jpg"], (), "")
    with pytest.raises(ConfigError, match=r"notes\.txt is no picture and no sound"):
        questions_of([files / "notes.txt"], (), "")
    with pytest.raises(ConfigError, match="nothing is asked about"):
        questions_of([], (), "")


def test_boxes_and_instances_are_drawn_where_they_are(files, tmp_path):
    pixels = np.zeros((50, 60), dtype=bool)
    pixels[30:40, 30:50] = True
    grey = Image.new("RGB", (60, 50), (128, 128, 128))
    reply = Reply(boxes=(Box("cell", (5, 6, 25, 26), 0.5),), instances=(Instance("nucleus", (50, 60), run_lengths(pixels)),))
    drawn = np.asarray(draw_reply(grey, reply)).astype(int)
    colours = colours_of(reply)
    assert tuple(drawn[25, 10]) == tuple(drawn[15, 24]) == colours["cell"]
    assert tuple(drawn[28, 40]) == tuple(drawn[45, 10]) == (128, 128, 128)
    # Between the picture's colour and the label's.
    towards = (drawn[35, 40] - 128) * (np.array(colours["nucleus"]) - 128)
    assert (towards >= 0).all() and towards.any()
    prediction = Prediction(Question((files / "a.jpg",)), Reply(boxes=(Box("cell", (1, 2, 30, 20)),)))
    assert draw(prediction, tmp_path / "drawn" / "a.png")
    assert Image.open(tmp_path / "drawn" / "a.png").size == (40, 30)
    assert not draw(Prediction(Question((files / "c.flac",)), Reply("one")), tmp_path / "c.png")


@pytest.mark.integration
def test_the_command_prints_a_line_a_file_and_draws(files, tmp_path, capsys):
    write_run(tmp_path / "run")
    words = ["predict", str(tmp_path / "run"), str(files / "a.jpg"), str(files / "b.PNG"), "--task", "detection", "--max-new-tokens", "6"]
    assert main([*words, "--draw", str(tmp_path / "drawn")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["files"] for line in lines] == [[str(files / "a.jpg")], [str(files / "b.PNG")]]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0000-a.png", "0001-b.png"]
    assert main(["predict", str(tmp_path / "run"), str(files / "gone.jpg"), "--task", "detection"]) == 1
    assert "gone.jpg does not exist; name pictures and sounds" in capsys.readouterr().err
