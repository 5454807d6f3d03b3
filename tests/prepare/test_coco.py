import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from megamm.core.errors import ConfigError, DataError
from megamm.core.masks import run_lengths
from megamm.prepare.sources.coco import _runs
from tests.support.preparing import omitted, samples, write_shards
from tests.support.shards import jpeg

CATEGORIES = [{"id": 3, "name": "red cell"}, {"id": 7, "name": "white cell"}]


def annotation(id, category=3, image=1, **fields):
    return {"id": id, "image_id": image, "category_id": category, **fields}


def write(tmp_path, *annotations, images=None, **changes):
    (tmp_path / "pictures").mkdir(exist_ok=True)
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg(20, 10))
    images = images or [{"id": 1, "file_name": "pictures/a.jpg", "width": 20, "height": 10}]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "categories": CATEGORIES, "annotations": list(annotations), **changes}))
    return path


def prepare(tmp_path, *annotations, images=None, **options):
    write_shards("coco", tmp_path / "out", input=write(tmp_path, *annotations, images=images), **options)
    return samples(tmp_path / "out")


def test_boxes_become_half_open_corners_in_source_pixels(tmp_path):
    found = prepare(tmp_path, annotation(1, bbox=[2, 1, 5.5, 3]), annotation(2, 7, bbox=[0, 0, 20, 10]))
    document, media = found["pictures/a"]
    assert document["task"] == "detection"
    assert document["messages"][1]["content"] == [
        {
            "type": "boxes",
            "image": 0,
            "boxes": [{"label": "red cell", "xyxy": [2, 1, 7.5, 4]}, {"label": "white cell", "xyxy": [0, 0, 20, 10]}],
        }
    ]
    assert document["messages"][0]["content"][1]["text"] == "Find every object."
    assert (document["image_id"], document["file"]) == (1, "pictures/a.jpg")
    assert list(media) == ["0.jpg"]
    assert omitted(tmp_path / "out") == []


def test_boxes_that_are_none_are_named_and_left_out(tmp_path):
    found = prepare(
        tmp_path,
        annotation(1, bbox=[2, 1, 0, 3]),
        annotation(2, bbox=[2, 1, 4, -3]),
        annotation(3, bbox=[20, 1, 4, 3]),
        annotation(4, bbox=[1, -5, 4, 5]),
        annotation(5, bbox=[-2, 8, 5, 5]),
        annotation(6, bbox=[15, 0, 5.0000001, 1]),
        annotation(7),
        annotation(8, bbox=[1, 2, float("nan"), 4]),
    )
    boxes = found["pictures/a"][0]["messages"][1]["content"][0]["boxes"]
    assert [box["xyxy"] for box in boxes] == [[0, 8, 3, 10], [15, 0, 20, 1]]
    assert [reason for _, what, reason in omitted(tmp_path / "out") if what == "part"] == [
        "annotation 1 (red cell): bbox [2, 1, 0, 3] has no area",
        "annotation 2 (red cell): bbox [2, 1, 4, -3] has no area",
        "annotation 3 (red cell): bbox [20, 1, 4, 3] lies outside of 20 x 10 pixels",
        "annotation 4 (red cell): bbox [1, -5, 4, 5] lies outside of 20 x 10 pixels",
        "annotation 5 (red cell): bbox [-2, 8, 5, 5] is cut at the edge of 20 x 10 pixels",
        "annotation 7 (red cell): bbox None is not four numbers",
        "annotation 8 (red cell): bbox [1, 2, nan, 4] is not four numbers",
    ]


def test_crowds_are_kept_beside_the_answer(tmp_path):
    found = prepare(tmp_path, annotation(1, bbox=[2, 1, 5, 3]), annotation(2, 7, bbox=[0, 0, 9, 9], iscrowd=1))
    document, _ = found["pictures/a"]
    assert [box["label"] for box in document["messages"][1]["content"][0]["boxes"]] == ["red cell"]
    assert document["crowd"] == [{"label": "white cell", "xyxy": [0, 0, 9, 9]}]
    assert omitted(tmp_path / "out") == [("pictures/a", "part", "1 crowds are kept beside the answer")]


def test_a_picture_without_annotations_has_no_boxes(tmp_path):
    assert prepare(tmp_path)["pictures/a"][0]["messages"][1]["content"] == [{"type": "boxes", "image": 0, "boxes": []}]


def rectangle(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def test_masks_of_polygons_and_run_lengths_keep_every_pixel(tmp_path):
    coder = pytest.importorskip("pycocotools.mask")
    run_length = np.zeros((10, 20), np.uint8, order="F")
    run_length[4:6, 4:6] = 1
    code = coder.encode(run_length)
    shapes = [
        rectangle(0, 0, 8, 5),
        {"size": code["size"], "counts": code["counts"].decode()},
        rectangle(10, 0, 15, 5),
        {"size": [10, 20], "counts": [0, 10, 190]},
    ]
    annotations = [annotation(number, 7 if number == 2 else 3, segmentation=shape) for number, shape in enumerate(shapes)]
    document, media = prepare(tmp_path, *annotations, answer="masks")["pictures/a"]
    parts = document["messages"][1]["content"]
    assert document["task"] == "segmentation"
    # the run-length square lies over the first rectangle and the column as well: they take a layer of their own
    assert [(part["member"], part["labels"]) for part in parts] == [
        ("1.mask.png", ["red cell", "white cell"]),
        ("2.mask.png", ["red cell", "red cell"]),
    ]
    maps = [np.asarray(Image.open(io.BytesIO(media[part["member"]]))) for part in parts]
    expected = np.zeros((10, 20), int)
    expected[0:5, 0:8], expected[0:5, 10:15] = 1, 2
    assert np.array_equal(maps[0], expected)
    assert np.array_equal(maps[1], run_length + 2 * (np.arange(20) < 1))


def test_segmentations_that_cannot_be_drawn_are_named(tmp_path):
    pytest.importorskip("pycocotools.mask")
    # pycocotools would read runs that are no picture's past their end, or write into memory that it never cleared.
    runs = [[5], [5, 7], [-5, 205], [5, 10**400], [5.0, 195], "zzzz", "R", "é", "05"]
    shapes = [None, [], [[1, 2, 3, 4]], [[1, 2, "x", 4, 5, 6]], rectangle(30, 30, 40, 40), {"size": [5, 5], "counts": [25]}, {"size": 3}]
    shapes += [{"size": [10, 20], "counts": one} for one in runs]
    annotations = [annotation(number, segmentation=shape) for number, shape in enumerate([*shapes, rectangle(0, 0, 8, 5)])]
    document, media = prepare(tmp_path, *annotations, answer="masks")["pictures/a"]
    assert document["messages"][1]["content"] == [{"type": "mask", "image": 0, "member": "1.mask.png", "labels": ["red cell"]}]
    assert np.asarray(Image.open(io.BytesIO(media["1.mask.png"]))).sum() == 8 * 5
    reasons = [reason for _, what, reason in omitted(tmp_path / "out") if what == "part"]
    assert [reason.partition(" (")[0] for reason in reasons] == [f"annotation {number}" for number in range(len(shapes))]
    assert "fewer than three corners" in reasons[2]
    assert "covers no pixel" in reasons[4]


def test_compressed_run_lengths_are_read_as_pycocotools_reads_them():
    coder = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    for share in (0.01, 0.5, 0.99):
        pixels = np.asfortranarray(random.random((37, 53)) < share).astype(np.uint8)
        pixels[:, 20:40] = pixels[:1, 20:40]
        assert _runs(coder.encode(pixels)["counts"].decode()) == list(run_lengths(pixels))


def test_a_picture_that_lost_all_its_masks_is_skipped(tmp_path):
    """It would be taken for one without instances, which has an empty mask."""
    pytest.importorskip("pycocotools.mask")
    shown = {"id": 2, "file_name": "pictures/b.jpg", "width": 20, "height": 10}
    path = write(tmp_path, annotation(1, segmentation=None), annotation(2, segmentation=[]))
    images = [*json.loads(path.read_text())["images"], shown]
    (tmp_path / "pictures" / "b.jpg").write_bytes(jpeg(20, 10))
    found = prepare(tmp_path, annotation(1, segmentation=None), annotation(2, segmentation=[]), images=images, answer="masks")
    assert list(found) == ["pictures/b"]
    document, media = found["pictures/b"]
    assert document["messages"][1]["content"] == [{"type": "mask", "image": 0, "member": "1.mask.png", "labels": []}]
    assert not np.asarray(Image.open(io.BytesIO(media["1.mask.png"]))).any()
    ((key, what, reason),) = omitted(tmp_path / "out")
    assert (key, what) == ("pictures/a", "sample")
    assert reason.startswith("none of its instances can be drawn: annotation 1 (red cell): its segmentation is no polygons")


def test_pictures_that_do_not_fit_their_entry_are_skipped(tmp_path):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (20, 10)).save(turned, format="JPEG", exif=exif)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "turned.jpg").write_bytes(turned.getvalue())
    entries = [("a.jpg", 20, 10), ("a.jpg", 10, 20), ("gone.jpg", 20, 10), ("turned.jpg", 20, 10), ("../../../x.jpg", 20, 10)]
    images = [
        {"id": number, "file_name": f"pictures/{name}" if number != 1 else "pictures/./a.jpg", "width": width, "height": height}
        for number, (name, width, height) in enumerate(entries)
    ]
    assert list(prepare(tmp_path, images=images)) == ["pictures/a"]
    reasons = sorted(reason for _, _, reason in omitted(tmp_path / "out"))
    assert len(reasons) == 4
    assert reasons[0].startswith("'pictures/../../../x.jpg' lies outside of")
    assert reasons[1] == "pictures/./a.jpg has 20 x 10 pixels, its entry says 10 x 20"
    assert reasons[2].startswith("pictures/turned.jpg is turned by its EXIF orientation 3")
    assert reasons[3].startswith("there is no file")


def test_the_root_of_the_pictures_can_lie_elsewhere(tmp_path):
    path = write(tmp_path, images=[{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10}])
    write_shards("coco", tmp_path / "out", input=path, root=tmp_path / "pictures", prompt="Cells?")
    assert samples(tmp_path / "out")["a"][0]["messages"][0]["content"][1]["text"] == "Cells?"


def test_categories_that_changed_since_are_not_mixed(tmp_path):
    prepare(tmp_path, annotation(1, bbox=[2, 1, 5.5, 3]))
    path = write(tmp_path, annotation(1, bbox=[2, 1, 5.5, 3]), categories=[{"id": 3, "name": "RBC"}])
    with pytest.raises(DataError, match="begun with settings"):
        write_shards("coco", tmp_path / "out", input=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [annotation(5, category=1)]}, "annotation 5 has category_id 1, which is no category"),
        ({"annotations": [annotation(5, image=2)]}, "annotation 5 has image_id 2, which is no image"),
        ({"annotations": [{"id": 1}]}, "is not in COCO's format: no 'category_id'"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": 1, "height": 1}] * 2}, "holds 1 pictures whose id occurs twice"),
        ({"images": 7}, "is not JSON in COCO's format"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        write_shards("coco", tmp_path / "out", input=write(tmp_path, **changes))
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(DataError, match=r"instances\.json is not JSON in COCO's format"):
        write_shards("coco", tmp_path / "out", input=tmp_path / "instances.json")


def test_masks_without_pycocotools_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigError, match=r"pip install 'megamm\[prepare\]'"):
        write_shards("coco", tmp_path / "out", input=write(tmp_path), answer="masks")
