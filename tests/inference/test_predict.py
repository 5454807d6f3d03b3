import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megamm.cli import main
from megamm.config import Head
from megamm.core.errors import ConfigError, DataError, MegaMMError
from megamm.core.masks import run_lengths
from megamm.core.predictions import Box, Instance
from megamm.data.media.files import decode_mask
from megamm.inference.drawing import draw_reply, instance_map, least_drawn
from megamm.inference.generate import ask
from megamm.inference.predict import Prediction, Question, draw, predict, questions_of
from megamm.tasks.reply import Reply
from tests.support.shards import flac, jpeg
from tests.support.tiny_run import random_model, write_run

LINEAR = Head("linear", ("zero", "one"))


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
    assert alone[0].to_json() == found[2].to_json()
    assert alone[0].to_json()["files"] == [str(files / "b.PNG")]
    assert len({one.reply.text for one in found}) > 1


def test_a_line_says_what_was_asked_and_what_was_answered(files, tmp_path):
    loaded = random_model(tmp_path)
    (spoken,) = predict(loaded, "question_answering", [Question(text="1 + 2 = ?")], max_new_tokens=4)
    assert spoken.to_json()["question"] == "1 + 2 = ?" and spoken.to_json()["text"] == spoken.reply.text
    (shown,) = predict(loaded, "captioning", [Question((files / "a.jpg",))], max_new_tokens=4)
    assert shown.to_json()["question"] == "What does this show?"


@pytest.mark.parametrize(
    ("task", "head"), [("captioning", None), ("speech_recognition", Head("ctc", ("a", "b"), states="audio")), ("sentiment", LINEAR)]
)
def test_a_model_that_overflows_is_an_error_instead_of_an_answer(files, tmp_path, task, head):
    loaded = write_run(tmp_path, head=head)
    with torch.no_grad():
        list((loaded.model.head or loaded.model.get_input_embeddings()).parameters())[-1].fill_(torch.inf)
    with pytest.raises(MegaMMError, match=r"gives no finite score in answer 1 of 2; its weights or activations overflow"):
        list(predict(loaded, task, questions_of([files / "c.flac"] * 2, (), ""), max_new_tokens=4))


def test_a_head_is_asked_for_what_it_answers(files, tmp_path):
    loaded = write_run(tmp_path, head=LINEAR)
    asked = [Question((files / "a.jpg",))]
    (found,) = predict(loaded, "sentiment", asked)
    assert found.reply.text in LINEAR.labels
    for task, kind in (("detection", "boxes"), ("segmentation", "mask"), ("recommendation", "item")):
        message = rf"task '{task}' is answered with {kind}, and this model's linear head says text or label; ask it for classification, "
        with pytest.raises(ConfigError, match=message):
            list(predict(loaded, task, asked))
    loaded.model.head.settings = Head("masked", states="towers")
    with pytest.raises(ConfigError, match="a masked head fills in what is hidden and answers nothing"):
        list(predict(loaded, "classification", asked))


def test_files_may_be_one_question(files, tmp_path):
    (asked,) = questions_of([files / "a.jpg", files / "c.flac"], (), "Do they match?", together=True)
    (found,) = predict(random_model(tmp_path), "matching", [asked], max_new_tokens=4)
    assert found.to_json()["files"] == [str(files / "a.jpg"), str(files / "c.flac")]


def test_a_damaged_file_is_named(files, tmp_path):
    loaded, damaged = random_model(tmp_path), tmp_path / "damaged.jpg"
    damaged.write_bytes((files / "a.jpg").read_bytes()[:200])
    asked = questions_of([files / "a.jpg", damaged], (), "")
    with pytest.raises(DataError, match=re.escape(f"{damaged}: ")):
        list(predict(loaded, "captioning", asked, max_new_tokens=4))
    with pytest.raises(DataError, match=re.escape(f"{damaged}: ")):
        ask(loaded, "", images=[files / "a.jpg", damaged])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no_bytes.wav", b"", "the sound's header cannot be read"),
        ("no_samples.wav", flac(0, format="WAV"), "the sound has 0 samples at 16000 Hz"),
        ("long.flac", flac(31 * 8000, rate_hz=8000), "the sound lasts 31.0 s, model.audio_features.max_seconds is 30.0"),
    ],
)
def test_an_empty_or_overlong_sound_is_named(files, tmp_path, capsys, name, content, message):
    write_run(tmp_path / "run")
    (tmp_path / name).write_bytes(content)
    words = ["predict", str(tmp_path / "run"), str(files / "c.flac"), str(tmp_path / name), "--task", "speech_recognition"]
    assert main([*words, "--batch-size", "1", "--max-new-tokens", "3"]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["files"] for line in printed.out.splitlines()] == [[str(files / "c.flac")]]
    assert printed.err.startswith(f"megamm: {tmp_path / name}: {message}") and len(printed.err.splitlines()) == 1


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
    colours = {}
    drawn = np.asarray(draw_reply(grey, reply, colours=colours)).astype(int)
    assert tuple(drawn[25, 10]) == tuple(drawn[15, 24]) == colours["cell"]
    assert tuple(drawn[28, 40]) == tuple(drawn[45, 10]) == (128, 128, 128)
    # Between the picture's colour and the label's.
    towards = (drawn[35, 40] - 128) * (np.array(colours["nucleus"]) - 128)
    assert (towards >= 0).all() and towards.any()
    prediction = Prediction(Question((files / "a.jpg",)), Reply(boxes=(Box("cell", (1, 2, 30, 20)),)))
    assert draw(prediction, tmp_path / "drawn" / "a.png")
    assert [Image.open(path).size for path in (tmp_path / "drawn").iterdir()] == [(40, 30)]
    assert not draw(Prediction(Question((files / "c.flac",)), Reply("one")), tmp_path / "c.png")


def test_a_box_of_less_than_a_pixel_is_drawn_and_labels_keep_their_colours():
    grey, colours = Image.new("RGB", (320, 240), (128, 128, 128)), {}
    thin = Box("line", (10, 10, 11, 60))
    small = np.asarray(draw_reply(grey, Reply(boxes=(thin,)), longest_side=64, colours=colours))
    assert (small != 128).any()
    first = colours["line"]
    drawn = np.asarray(draw_reply(grey, Reply(boxes=(Box("a", (100, 100, 200, 200)), thin)), colours=colours))
    assert colours["line"] == first != colours["a"] and tuple(drawn[30, 10]) == first


def test_what_a_head_is_unsure_of_is_not_drawn():
    boxes, instances = (Box("a", (0, 0, 9, 9), 0.4), Box("a", (0, 0, 9, 9), 0.5)), (Instance("b", (1, 1), (0, 1), 0.49),)
    reply = Reply("", boxes, instances)
    assert reply.surer_than(least_drawn(None)) == reply
    assert reply.surer_than(least_drawn(Head("detector", ("a",)))) == Reply(boxes=boxes[1:])


def test_a_task_is_asked_about_what_it_is_about(files, tmp_path):
    loaded = random_model(tmp_path)
    for task, question, message in (
        ("detection", Question(text="1"), "the text alone: the question shows no image, which detection is about"),
        ("detection", Question((files / "c.flac",)), r"c\.flac: the question shows no image"),
        ("speech_recognition", Question((files / "a.jpg",)), r"a\.jpg: the question shows no audio"),
        ("captioning", Question(text="1"), "shows no image and no audio"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(predict(loaded, task, [question]))


def test_nothing_found_is_an_empty_list():
    assert Prediction(Question(text="?"), Reply(), ("boxes",)).to_json() == {"question": "?", "boxes": [], "text": ""}
    assert "boxes" not in Prediction(Question(text="?"), Reply("a")).to_json()


def test_maps_of_instances_are_masks_of_samples(files, tmp_path):
    sets = np.zeros((3, 30, 40), dtype=bool)
    sets[0, 2:10, 3:20], sets[1, 5:15, 10:30], sets[2, 29:, 39:] = True, True, True
    instances = tuple(Instance("cell", (30, 40), run_lengths(pixels)) for pixels in sets)
    path = tmp_path / "0000-a.b.png"
    assert draw(Prediction(Question((files / "a.jpg",)), Reply(instances=instances)), path)
    numbered = tmp_path / "0000-a.b.instances.png"
    assert Image.open(numbered).mode == "I;16"
    found = decode_mask(numbered.read_bytes())
    assert np.array_equal(found, np.select([*sets[::-1]], [3, 2, 1], 0)) and set(np.unique(found)) == {0, 1, 2, 3}
    many = instance_map([replace(instances[0], counts=(number, 1, 1199 - number)) for number in range(1200)])
    assert np.array_equal(np.asarray(many).ravel(order="F"), np.arange(1, 1201))
    with pytest.raises(DataError, match="65536 instances are more than the 65535 of a map of 16 bits"):
        instance_map(instances[:1] * 65536)
    # Drawn anew without instances, no map of the earlier answer is left.
    assert draw(Prediction(Question((files / "a.jpg",)), Reply()), path) and not numbered.exists()


@pytest.mark.integration
def test_the_command_prints_a_line_a_file_and_draws(files, tmp_path, capsys):
    write_run(tmp_path / "run")
    words = ["predict", str(tmp_path / "run"), str(files / "a.jpg"), str(files / "b.PNG"), "--task", "detection", "--max-new-tokens", "6"]
    assert main([*words, "--draw", str(tmp_path / "drawn")]) == 0
    printed = capsys.readouterr().out
    # Behind the options, as README has it, and on both sides of them.
    for before in (0, 1):
        first, second = words[2:4]
        assert main([*words[:2], *[first][:before], *words[4:], *[first][before:], second]) == 0
        assert capsys.readouterr().out == printed
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["files"] for line in lines] == [[str(files / "a.jpg")], [str(files / "b.PNG")]]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0000-a.png", "0001-b.png"]
    assert main(["predict", str(tmp_path / "run"), str(files / "gone.jpg"), "--task", "detection"]) == 1
    assert "gone.jpg does not exist; name pictures and sounds" in capsys.readouterr().err
