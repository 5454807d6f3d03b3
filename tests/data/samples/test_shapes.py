import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megamm.config import Augment, Data
from megamm.core.types import MediaFacts, Message, Part, Sample
from megamm.data.ledger import BadSample
from megamm.data.media.augment import Changes
from megamm.data.media.features import MediaRules
from megamm.data.media.files import MediaError, decode_mask
from megamm.data.samples.encode import SampleEncoder
from megamm.tasks.reply import read_reply, stored_reply
from megamm.tokenizers import text
from tests.data.conftest import MODEL
from tests.support.shards import jpeg

WIDTH, HEIGHT = 40, 30
FACTS = {"0.png": MediaFacts("image", WIDTH, HEIGHT)}
BOXES = ({"label": "cat", "xyxy": [2, 3, 12, 13]}, {"label": "dog", "xyxy": [20, 10, 40, 30]}, {"label": "cat", "xyxy": [0, 20, 6, 30]})


def png(values) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def instances() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    mask[3:13, 2:12] = 1
    mask[10:30, 20:40] = 300
    return mask


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from megamm.config import Tokenizer

    tokenizer = text.train(["find the cat and the dog"] * 50, Tokenizer(text_size=290), tmp_path_factory.mktemp("located"))
    return SampleEncoder(tokenizer, MediaRules.of(MODEL, Data()))


def sample(part, **media):
    messages = (Message("user", (Part("image", member="0.png"),)), Message("assistant", (part,)))
    task = "detection" if part.type == "boxes" else "segmentation"
    return Sample("k", task, messages, {"0.png": jpeg(WIDTH, HEIGHT, format="PNG"), **media})


def boxes(*found):
    return Part("boxes", data={"image": 0, "boxes": list(found)})


MASK = Part("mask", member="1.png", data={"image": 0, "labels": ["cat"] + ["gone"] * 298 + ["dog"]})
STRONG = Augment(image_crop=0.8, image_flip=True, image_shift=0.3, image_zoom=0.3, image_rotate_degrees=90.0)


@pytest.mark.parametrize("part", [boxes(*BOXES), boxes(), MASK])
def test_planned_lengths_hold_whatever_a_change_leaves_of_a_picture(encoder, part):
    one = sample(part, **{"1.png": png(instances())})
    (planned,) = encoder.measure(one, FACTS)
    hidden, pad = 0, encoder.tokenizer.vocabulary.control_id("pad")
    for position in range(40):
        sequence, size = encoder.encode("cells", one, Changes.at(STRONG, 0, position))
        assert size == planned
        hidden += pad in sequence.input_ids
        assert not sequence.weights[sequence.input_ids == pad].any()
        last = np.flatnonzero(sequence.input_ids != pad)[-1]
        assert sequence.input_ids[last] == encoder.tokenizer.vocabulary.control_id("end")
    assert hidden or not part.data.get("boxes", True)


def answer_of(encoder, one, changes=None):
    sequence, _ = encoder.encode("cells", one, changes)
    ids = sequence.labels[sequence.labels != -100].tolist()[:-1]
    return read_reply(ids, encoder.tokenizer, sequence.images[0].view)


def test_boxes_come_back_from_a_changed_picture_where_they_are_in_it(encoder):
    mirrored = Augment(image_flip=True, image_crop=0.3)
    for position in range(20):
        for box in answer_of(encoder, sample(boxes(*BOXES)), Changes.at(mirrored, 0, position)).boxes:
            # Each edge is the stored one, or further in where the crop cut it off.
            assert any(
                box.label == stored["label"]
                and all(box.xyxy[i] >= stored["xyxy"][i] - 0.1 and box.xyxy[i + 2] <= stored["xyxy"][i + 2] + 0.1 for i in (0, 1))
                for stored in BOXES
            )
    whole = answer_of(encoder, sample(boxes(*BOXES))).boxes
    assert sorted((box.label, *map(round, box.xyxy)) for box in whole) == sorted((box["label"], *box["xyxy"]) for box in BOXES)


def test_instances_come_back_as_their_outlines(encoder):
    one = sample(MASK, **{"1.png": png(instances())})
    encoder = replace(encoder, rules=replace(encoder.rules, outline_points=80))
    found = {instance.label: instance for instance in answer_of(encoder, one).instances}
    stored = {instance.label: instance for instance in stored_reply([MASK], {"1.png": instances().astype(np.int32)}).instances}
    assert found.keys() == stored.keys() == {"cat", "dog"}
    assert all(found[label].counts == stored[label].counts for label in found)


@pytest.mark.parametrize(
    ("part", "mask", "message"),
    [
        (
            boxes(*BOXES, {"label": "dog", "xyxy": [30, 0, 41, 10]}),
            None,
            r"box 3 \(dog\) is \[30, 0, 41, 10\], outside its picture of 40 x 30",
        ),
        (MASK, instances()[:-1], "mask 1.png has 40 x 29 pixels, its picture 40 x 30"),
        (MASK, instances() + 1, "mask 1.png holds instance 301, and 300 labels"),
        (MASK, None, "mask 1.png is missing"),
        (MASK, np.zeros((HEIGHT, WIDTH, 3), np.uint8), "a PNG of mode RGB; write a PNG of one channel"),
    ],
)
def test_shapes_that_do_not_fit_their_picture_are_named(encoder, part, mask, message):
    one = sample(part, **({} if mask is None else {"1.png": png(mask)}))
    with pytest.raises(BadSample, match=message):
        encoder.encode("cells", one)
    if part is not MASK:
        with pytest.raises(BadSample, match=message):
            encoder.measure(one, FACTS)


def test_masks_of_one_channel_are_read_as_they_are_written():
    for values in (instances(), instances().astype(np.uint8), instances() > 0):
        assert np.array_equal(decode_mask(png(values)), values.astype(np.int32))
    palette = Image.fromarray(instances().astype(np.uint8)).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert decode_mask(file.getvalue()).shape == (HEIGHT, WIDTH)
    with pytest.raises(MediaError, match="the mask cannot be decoded"):
        decode_mask(png(instances())[:-60])
