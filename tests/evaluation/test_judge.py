"""Answers that are no text: boxes and instances in source pixels, rankings of items."""

import io

import numpy as np
import pytest
from PIL import Image

from megamm.config import Tokenizer
from megamm.data.shards.index import write_index
from megamm.evaluation.held_out import list_places, read_samples
from megamm.evaluation.judge import judge
from megamm.evaluation.records import Answered, SkippedSample
from megamm.evaluation.report import make_report
from megamm.tokenizers import text
from megamm.tokenizers.items import ItemTable
from tests.support.shards import as_files, jpeg, write_tar
from tests.support.tiny_run import SENTENCES, random_model

IMAGE = {"type": "image", "member": "0.png"}
ITEMS = ("cup", "hat", "lamp", "shoe")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    items = ItemTable(ITEMS, ("",) * 4, np.array([[0, 0], [0, 1], [1, 0], [1, 2]], dtype=np.int32), 3)
    pieces = text.train(SENTENCES * 4, Tokenizer(text_size=320, item_levels=2, item_codes=3), folder / "tokenizer", items=items)
    return random_model(folder, pieces=pieces)


def results(loaded, folder, samples):
    write_index(write_tar(folder / "x-0.tar", samples))
    places = list_places({"x": str(folder / "x-*.tar")})
    return list(judge(loaded, read_samples(places), tasks=(), batch_size=2, max_new_tokens=4))


def asked(task, question, answer):
    return {"task": task, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_every_item_is_ranked_for_a_recommendation(loaded, tmp_path):
    def item(name):
        return {"type": "item", "id": name}

    samples = {
        "a": as_files(asked("recommendation", [item("cup"), {"type": "text", "text": "What next?"}], [item("lamp"), item("hat")])),
        "b": as_files(asked("recommendation", [item("shoe")], [item("cup")])),
        "c": as_files(asked("recommendation", [item("unheard of")], [item("cup")])),
    }
    one, other, unknown = sorted(results(loaded, tmp_path, samples), key=lambda result: result.key)
    assert isinstance(unknown, SkippedSample) and "item 'unheard of' is not among the tokenizer's 4 items" in unknown.reason
    for record in (one, other):
        assert isinstance(record, Answered)
        assert sorted(found.id for found in record.answer.items) == list(ITEMS)
        scores = [found.log_probability for found in record.answer.items]
        assert scores == sorted(scores, reverse=True)
    report = make_report([one, other], [], source="here", step=None, settings={})
    values = {row.metric: row for row in report.rows}
    # Four items are all among the first ten.
    assert values["recall_at_10"].value == 1 and values["recall_at_10"].samples == 2


def test_places_are_judged_as_they_are_stored(loaded, tmp_path):
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:15, 5:25] = 1
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    picture = jpeg(40, 30, format="PNG")
    boxes = {"type": "boxes", "image": 0, "boxes": [{"label": "cell", "xyxy": [5, 5, 25, 15]}]}
    outlined = {"type": "mask", "image": 0, "member": "1.png", "labels": ["cell"]}
    samples = {
        "boxes": as_files(asked("detection", [IMAGE], [boxes]), _0_png=picture),
        "none": as_files(asked("detection", [IMAGE], [{**boxes, "boxes": []}]), _0_png=picture),
        "mask": as_files(asked("segmentation", [IMAGE], [outlined]), _0_png=picture, _1_png=file.getvalue()),
        "no mask": as_files(asked("segmentation", [IMAGE], [outlined]), _0_png=picture),
        "blank": as_files(asked("captioning", [IMAGE], [{"type": "text", "text": " \n"}]), _0_png=picture),
    }
    found = {result.key: result for result in results(loaded, tmp_path, samples)}
    assert found["boxes"].reference.boxes[0].xyxy == (5, 5, 25, 15)
    assert found["none"].reference.boxes == ()
    (instance,) = found["mask"].reference.instances
    assert instance.size == (30, 40) and sum(instance.counts[1::2]) == 200
    assert "mask 1.png is missing" in found["no mask"].reason
    assert "the stored answer is blank" in found["blank"].reason
    records = [result for result in found.values() if isinstance(result, Answered)]
    rows = {(row.task, row.metric): row for row in make_report(records, [], source="here", step=None, settings={}).rows}
    # A model of random weights finds nothing.
    assert rows["detection", "map50"].value == rows["segmentation", "foreground_iou"].value == 0
    assert rows["detection", "map50"].samples == 2
