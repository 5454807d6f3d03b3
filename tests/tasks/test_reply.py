import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.core.errors import DataError
from megamm.core.geometry import PictureView, Shape, seen_box
from megamm.core.masks import run_lengths
from megamm.core.predictions import Box, Instance
from megamm.core.types import Message, Part
from megamm.tasks import template
from megamm.tasks.parts import parse_part
from megamm.tasks.reply import Reply, read_reply, stored_reply

VIEW = PictureView.whole(320, 240)
BOXES = Part(
    "boxes", data={"image": 0, "boxes": [{"label": "RBC", "xyxy": [10, 20, 110.5, 220]}, {"label": "白", "xyxy": [0, 0, 320, 240]}]}
)


def answer_ids(parts, shapes, tokenizer):
    """What a model that gives the stored answer would generate."""
    messages = (Message("user", (Part("image", member="0.png"),)), Message("assistant", tuple(parts)))
    encoded = template.encode(messages, tokenizer, image_tokens=[1], shapes=shapes)
    return encoded.input_ids[encoded.supervised].tolist()[:-1]


def test_boxes_come_back_in_source_pixels(tokenizer):
    shapes = [seen_box(box["label"], box["xyxy"], VIEW) for box in BOXES.data["boxes"]]
    reply = read_reply(answer_ids([BOXES], [shapes], tokenizer), tokenizer, VIEW)
    assert [box.label for box in reply.boxes] == ["白", "RBC"]
    assert reply.boxes[0].xyxy == (0, 0, 320, 240)
    # Half a bin of a thousand.
    assert reply.boxes[1].xyxy == pytest.approx((10, 20, 110.5, 220), abs=320 / 999 / 2)
    assert (reply.text, reply.num_malformed, reply.is_finished) == ("", 0, True)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200), st.integers(1, 20), st.integers(1, 40)), max_size=6))
def test_any_boxes_come_back(tokenizer, places):
    boxes = [{"label": f"kind {n}", "xyxy": [x, y, x + width, y + height]} for n, (x, y, width, height) in enumerate(places)]
    shapes = [seen_box(box["label"], box["xyxy"], VIEW) for box in boxes]
    part = Part("boxes", data={"image": 0, "boxes": boxes})
    reply = read_reply(answer_ids([part], [shapes], tokenizer), tokenizer, VIEW)
    assert reply.num_malformed == 0
    found = {box.label: box.xyxy for box in reply.boxes}
    assert found == {box["label"]: pytest.approx(box["xyxy"], abs=0.2) for box in boxes}


def test_text_beside_boxes_stays_text(tokenizer):
    parts = [Part("text", text="Two cells: "), BOXES]
    shapes = [seen_box(box["label"], box["xyxy"], VIEW) for box in BOXES.data["boxes"]]
    reply = read_reply(answer_ids(parts, [shapes], tokenizer), tokenizer, VIEW)
    assert reply.text == "Two cells: " and len(reply.boxes) == 2


def test_an_instance_comes_back_as_pixels(tokenizer):
    corners = ((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75))
    part = Part("mask", member="1.png", data={"image": 0, "labels": ["nucleus"]})
    ids = answer_ids([part], [[Shape("nucleus", corners)]], tokenizer)
    (instance,) = read_reply(ids, tokenizer, VIEW).instances
    pixels = np.zeros((240, 320), dtype=bool)
    pixels[60:180, 80:240] = True
    assert (instance.label, instance.size) == ("nucleus", (240, 320))
    assert instance.counts == run_lengths(pixels)


def test_a_score_is_the_labels_chance_times_the_least_sure_location(tokenizer):
    shapes = [seen_box("RBC", (10, 20, 110, 220), VIEW)]
    ids = answer_ids([BOXES], [shapes], tokenizer)
    num_label = len(tokenizer.encode("RBC"))
    chances = [0.9, 0.8, 0.4, 0.7, 0.6, 1.0, *[0.5] * num_label]
    (box,) = read_reply(ids, tokenizer, VIEW, probabilities=chances).boxes
    assert box.score == pytest.approx(0.4 * 0.5**num_label)


def test_what_is_no_box_is_counted_and_left_out(tokenizer):
    shapes = [seen_box("RBC", (10, 20, 110, 220), VIEW)]
    ids, label = answer_ids([BOXES], [shapes], tokenizer), tokenizer.encode("RBC")
    wrong = {
        "three locations": ids[:3] + ids[4:],
        "five locations": ids[:3] + ids[2:],
        "no end": [token for token in ids if token != tokenizer.vocabulary.control_id("box_end")],
        "no label": ids[: -len(label)],
        "cut off": ids[:3],
        "text among locations": ids[:2] + label + ids[3:],
        "no area": [ids[0], ids[1], ids[2], ids[1], *ids[4:]],
    }
    for what, tokens in wrong.items():
        reply = read_reply(tokens + ids, tokenizer, VIEW)
        assert (len(reply.boxes), reply.num_malformed) == (1, 1), what
    assert read_reply(ids, tokenizer, None) == Reply(num_malformed=1)
    assert read_reply([], tokenizer, VIEW) == Reply()


def test_a_stored_answer_says_the_same(tokenizer):
    mask = np.zeros((4, 5), dtype=np.int32)
    mask[1:3, 1:3] = 1
    mask[3, 4] = 3
    part = Part("mask", member="1.png", data={"image": 0, "labels": ["a", "hidden", "c"]})
    reply = stored_reply([Part("label", text="two"), BOXES, part], {"1.png": mask})
    assert reply.text == "two"
    assert reply.boxes == (Box("RBC", (10, 20, 110.5, 220)), Box("白", (0, 0, 320, 240)))
    assert reply.instances == (Instance("a", (4, 5), run_lengths(mask == 1)), Instance("c", (4, 5), run_lengths(mask == 3)))
    assert reply.to_json()["boxes"][0] == {"label": "RBC", "xyxy": [10, 20, 110.5, 220], "score": 1.0}
    with pytest.raises(DataError, match=r"mask 1\.png is missing"):
        stored_reply([part], {})
    with pytest.raises(DataError, match="holds instance 4, and 3 labels"):
        stored_reply([part], {"1.png": mask + 1})


def test_items_come_back_with_how_likely_they_were(with_items):
    parts = [Part("item", data={"id": "lamp"}), Part("item", data={"id": "cup"})]
    ids = answer_ids(parts, [], with_items)
    reply = read_reply(ids, with_items, probabilities=[0.5, 0.5, 1.0, 0.25])
    assert [item.id for item in reply.items] == ["lamp", "cup"]
    assert [item.log_probability for item in reply.items] == pytest.approx([np.log(0.25), np.log(0.25)])
    assert [item.id for item in stored_reply(parts, {}).items] == ["lamp", "cup"]
    # An item that is none, one that is cut off, and one without its beginning.
    none = with_items.vocabulary.item_id(1, 1)
    for wrong in ([ids[0], none], [ids[0]], [ids[1]]):
        text = with_items.encode("and")
        found = read_reply([*wrong, *text, *ids], with_items)
        assert ([item.id for item in found.items], found.num_malformed, found.text) == (["lamp", "cup"], 1, "and")


def test_blanks_around_a_label_tell_nothing_apart(tokenizer):
    part = parse_part({"type": "boxes", "image": 0, "boxes": [{"label": " cell ", "xyxy": [0, 0, 9, 9]}]}, "content[0]", "here")
    mask = Part("mask", member="1.png", data={"image": 0, "labels": ["nucleus "]})
    found = stored_reply([part, mask], {"1.png": np.ones((2, 2), dtype=np.int32)})
    assert [box.label for box in found.boxes] == ["cell"] and [one.label for one in found.instances] == ["nucleus"]


def test_an_answer_in_words_has_the_probability_of_its_tokens(tokenizer):
    ids = tokenizer.encode("one two")
    chances = [0.5] * len(ids)
    reply = read_reply(ids, tokenizer, probabilities=chances)
    assert reply.probability == 0.5 ** len(ids)
    assert Reply.from_json(reply.to_json()) == reply
    assert read_reply(ids, tokenizer).probability is None
    assert read_reply(ids, tokenizer, probabilities=[float("nan")] * len(ids)).probability is None
    shapes = [seen_box(box["label"], box["xyxy"], VIEW) for box in BOXES.data["boxes"]]
    boxed = answer_ids([BOXES], [shapes], tokenizer)
    assert read_reply(boxed, tokenizer, VIEW, probabilities=[0.5] * len(boxed)).probability is None
