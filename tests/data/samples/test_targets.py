"""What a stored answer becomes for a head, and what is refused."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megamm.config import AudioFeatures, Head, ImageFeatures
from megamm.core.geometry import Affine, PictureView
from megamm.core.types import IGNORE_LABEL, PackedRow
from megamm.data.ledger import BadSample
from megamm.data.loading.arena import map_arrays
from megamm.data.loading.collate import batch_bytes, collate
from megamm.data.media.features import MediaRules
from megamm.data.media.files import DECODERS
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.targets import inner_pixels, resampled
from megamm.tasks import template
from tests.support.shards import flac, jpeg

IMAGE, AUDIO = {"type": "image", "member": "0.jpg"}, {"type": "audio", "member": "0.flac"}
CELLS = Head("detector", ("cell", "platelet"), num_queries=3)
LETTERS = Head("ctc", tuple("abcdefghijklmnopqrstuvwxyz "), states="audio")
RULES = MediaRules(ImageFeatures(patch_size=4, max_patches=64), AudioFeatures(num_mel=16))


def mask_png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def made(tokenizer):
    """Encode a sample for a head, from its answer's parts and its media, and measure it as planning does."""

    def make(head: Head, answer: list, media: dict[str, bytes] | None = None, question: list | None = None, rules=RULES, **document):
        media = {"0.jpg": jpeg(32, 16)} if media is None else media
        asked = ([IMAGE] if "0.jpg" in media else []) + ([AUDIO] if "0.flac" in media else []) if question is None else question
        turns = [{"role": "user", "content": [*asked, {"type": "text", "text": "what is it?"}]}, {"role": "assistant", "content": answer}]
        sample = template.parse_sample("k", {"task": "classification", "messages": turns} | document, where="here")
        encoder = SampleEncoder(tokenizer, replace(rules, head=head), {"classification": 2.0})
        facts = {name: DECODERS[name.rpartition(".")[2]].facts(io.BytesIO(content)) for name, content in media.items()}
        (planned,) = encoder.measure(sample, facts)
        sequence, footprint = encoder.encode("d", replace(sample, media=media))
        assert footprint == planned
        return sequence

    return make


def label(text: str) -> list:
    return [{"type": "label", "text": text}]


def boxes(*of: tuple) -> list:
    return [{"type": "boxes", "image": 0, "boxes": [{"label": name, "xyxy": list(xyxy)} for name, xyxy in of]}]


def test_the_sample_is_its_question_alone_and_its_last_token_carries_the_weight(made, tokenizer):
    sequence = made(Head("linear", ("cat", "dog")), label("dog"))
    assert sequence.input_ids[-1] == tokenizer.vocabulary.control_id("assistant")
    assert (sequence.labels == IGNORE_LABEL).all()
    assert sequence.weights.tolist() == [0.0] * (len(sequence.input_ids) - 1) + [2.0]
    assert sequence.target.ids.tolist() == [1] and sequence.target.counts.tolist() == [1.0]


def test_several_labels_stand_in_parts_or_between_commas(made):
    emotions = Head("linear", ("joy", "anger", "fear"), multi_label=True)
    assert made(emotions, label("fear, joy, fear")).target.ids.tolist() == [0, 2]
    assert made(emotions, label("fear") + label("anger")).target.ids.tolist() == [1, 2]
    assert made(emotions, label(" ")).target.ids.tolist() == []


def test_boxes_are_shares_of_the_view_with_both_counts(made):
    target = made(CELLS, boxes(("platelet", (8, 4, 24, 12)), ("cell", (0, 0, 32, 16)))).target
    assert target.ids.tolist() == [1, 0]
    np.testing.assert_allclose(target.boxes, [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    assert target.counts.tolist() == pytest.approx([2 + 0.1, 2])
    assert made(CELLS, boxes()).target.boxes.shape == (0, 4)


def test_where_each_cell_asks_for_a_box_there_are_as_many_queries_as_cells(made):
    answer = boxes(*[("cell", (0, 0, 4, 4))] * 4)
    rules = replace(RULES, image=replace(RULES.image, merge=2, max_patches=32))
    for states, num_cells in (("vision", 4 * 8), ("decoder", 2 * 4)):
        target = made(replace(CELLS, queries="cells", states=states), answer, rules=rules).target
        assert target.counts.tolist() == pytest.approx([4 + 0.1 * (num_cells - 4), 4])
    with pytest.raises(BadSample, match="12 boxes in a picture of 8 cells"):
        made(replace(CELLS, queries="cells"), answer * 3, rules=rules)


def test_pixels_are_classes_on_the_grid_and_touching_instances_have_a_seam(made):
    head = Head("segmenter", ("nucleus", "wall"), states="vision", num_layers=2)
    values = np.zeros((16, 32))
    values[2:14, 2:16], values[2:14, 16:30] = 1, 2
    parts = [{"type": "mask", "image": 0, "member": "1.png", "labels": ["wall", "nucleus"]}]
    target = made(head, parts, {"0.jpg": jpeg(32, 16), "1.png": mask_png(values)}, question=[IMAGE]).target
    # As many pixels as the grid of 4-pixel patches, made 4 times finer, has: those of the picture.
    rows, columns = target.pixels.shape[1:]
    assert columns == 2 * rows and target.counts.tolist() == [rows * columns]
    middle, seam = rows // 2, columns // 2
    assert target.pixels[0, middle, columns // 4] == 2 and target.pixels[0, middle, 3 * columns // 4] == 1
    assert target.pixels[1, middle, columns // 4] == target.pixels[1, middle, 3 * columns // 4] == 1
    assert not target.pixels[1, middle, seam - 1 : seam + 1].any()
    assert target.pixels[:, 0].max() == 0


def test_characters_count_pauses_between_equal_ones(made):
    sound = flac(16000)
    target = made(LETTERS, label("three"), {"0.flac": sound}).target
    assert target.ids.tolist() == [19, 7, 17, 4, 4] and target.counts.tolist() == [5.0]


@pytest.mark.parametrize(
    ("head", "answer", "changes", "reason"),
    [
        (Head("linear", ("cat", "dog")), label("dgo"), {}, "'dgo' is not among the 2 of model.head.labels; did you mean 'dog'"),
        (CELLS, boxes(("cat", (0, 0, 4, 4))), {}, "'cat' is not among"),
        (CELLS, boxes(*[("cell", (0, 0, 4, 4))] * 4), {}, "4 boxes, and the head finds 3 at most"),
        (CELLS, boxes(("cell", (0, 0, 33, 4))), {}, "outside its picture"),
        (CELLS, label("cell"), {}, "the answer holds a label part, and a detector head answers with boxes"),
        (CELLS, boxes(), {"question": [IMAGE, IMAGE]}, "holds 2 image parts, and this detector head looks at exactly 1"),
        (Head("linear", ("a",), states="audio"), label("a"), {}, "holds 0 audio parts"),
        (
            Head("linear", ("a",), states="towers"),
            label("a"),
            {"media": {}},
            "no image and no audio, and this linear head looks at nothing",
        ),
        (LETTERS, label("Zero"), {"media": {"0.flac": flac(8000)}}, "'Z' is not among the 27"),
        (LETTERS, label("on and " * 30), {"media": {"0.flac": flac(8000)}}, "set model.head.time_steps higher"),
        (
            Head("linear", ("a",)),
            label("a"),
            {"task": "text", "messages": [{"role": "assistant", "content": "a"}], "media": {}},
            "a plain document asks nothing",
        ),
    ],
)
def test_what_a_head_cannot_answer_is_refused_with_the_reason(made, head, answer, changes, reason):
    with pytest.raises(BadSample, match=reason):
        made(head, answer, **changes)


def test_collating_keeps_what_belongs_to_each_sample_and_knows_an_empty_batch(made):
    first, second = made(CELLS, boxes(("cell", (0, 0, 16, 8)))), made(CELLS, boxes(("cell", (0, 0, 8, 8)), ("platelet", (8, 8, 16, 16))))
    carried = map_arrays(second, np.copy)
    batch = collate([PackedRow([first]), PackedRow(), PackedRow([carried])], 64, 0, ("classification",), head=CELLS)
    assert batch.head.num_ids.tolist() == [1, 2] and batch.head.ids.tolist() == [0, 0, 1]
    assert batch.head.boxes.shape == (3, 4) and batch.head.weights.tolist() == [2.0, 2.0] and batch.weight_sum == 4.0
    assert batch_bytes(batch) > batch_bytes(replace(batch, head=None))
    empty = collate([PackedRow()], 64, 0, ("classification",), head=CELLS).head
    assert empty.counts.shape == (0, 2) and empty.boxes.shape == (0, 4) and empty.pixels.shape == (2, 0)


def test_resampling_follows_the_view_and_leaves_what_lies_outside_empty():
    values = np.arange(1, 9).reshape(2, 4)
    np.testing.assert_array_equal(resampled(values, PictureView.whole(4, 2), (2, 4)), values)
    mirrored = PictureView(4, 2, Affine.scale(-1 / 4, 1 / 2).then(Affine.shift(1, 0)))
    np.testing.assert_array_equal(resampled(values, mirrored, (2, 4)), values[:, ::-1])
    shifted = PictureView(4, 2, Affine.scale(1 / 4, 1 / 2).then(Affine.shift(0.5, 0)))
    np.testing.assert_array_equal(resampled(values, shifted, (2, 4)), [[0, 0, 1, 2], [0, 0, 5, 6]])


def test_thin_instances_are_wholly_inner():
    instances = np.array([[1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 1, 2]])
    np.testing.assert_array_equal(inner_pixels(instances), [[1, 1, 0, 1]] * 3)
