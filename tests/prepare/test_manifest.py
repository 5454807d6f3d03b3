import csv
import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image

from megamm.core.errors import ConfigError, DataError
from tests.support.preparing import omitted, samples, text_of, write_shards
from tests.support.shards import flac, jpeg


def write_csv(path, header, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_tsv(path, *rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def root(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(4 + number, 3, seed=number))
        (tmp_path / f"{number}.flac").write_bytes(flac(800, seed=number))
    return tmp_path


def prepare(root, table, *pairs, **options):
    write_shards("manifest", root / "out", job=options.pop("job", None), input=table, map=pairs, **options)
    return samples(root / "out", options.get("split", "train"))


def test_columns_named_like_fields_need_no_map(root):
    table = write_csv(root / "a.csv", ["image", "label", "x"], ["0.jpg", 'a "quoted", label', "1"], ["1.jpg", "二\nlines", "2"])
    found = prepare(root, table)
    assert list(sorted(found)) == ["row-00000002", "row-00000004"]  # the second row begins on line 3 and ends on line 4
    document, media = found["row-00000002"]
    assert document == {
        "task": "classification",
        "messages": [
            {"role": "user", "content": [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "label", "text": 'a "quoted", label'}]},
        ],
    }
    assert media == {"0.jpg": (root / "0.jpg").read_bytes()}
    assert text_of(found["row-00000004"][0]) == "二\nlines"
    assert omitted(root / "out") == [("", "input", "column x is not used")]


def test_every_field_has_its_place(root):
    row = {
        "pictures": ["0.jpg", "1.jpg"], "sound": "0.flac", "t": "Look.", "q": "Same?", "s": "Be brief.", "name": "été/1",
        "a": "yes", "c": ["left", "right"], "out": "1.jpg", "say": "1.flac", "who": {"age": 7},
    }  # fmt: skip
    pairs = [
        ("pictures", "image"), ("sound", "audio"), ("t", "text"), ("q", "prompt"), ("s", "system"), ("name", "key"),
        ("a", "answer"), ("c", "label"), ("out", "answer_image"), ("say", "answer_audio"), ("who", "metadata"),
    ]  # fmt: skip
    found = prepare(root, write_jsonl(root / "a.jsonl", row), *pairs, task="everything")
    ((key, (document, media)),) = found.items()
    assert key.startswith("t/1-")
    assert document["who"] == {"age": 7}
    assert document["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]} | {"content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "member": "0.jpg"},
                {"type": "image", "member": "1.jpg"},
                {"type": "audio", "member": "2.flac"},
                {"type": "text", "text": "Look.\n"},
                {"type": "text", "text": "Same?"},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "label", "text": "left, right"},
                {"type": "text", "text": "yes"},
                {"type": "image", "member": "3.jpg"},
                {"type": "audio", "member": "4.flac"},
            ],
        },
    ]
    assert [len(content) for content in media.values()] == [
        (root / name).stat().st_size for name in ("0.jpg", "1.jpg", "0.flac", "1.jpg", "1.flac")
    ]


def test_a_prompt_holds_columns(root):
    table = write_tsv(root / "a.tsv", ["en", "zh"], ['He said "hi".', "他说“嗨”。"])
    (found,) = prepare(root, table, ("zh", "answer"), task="translation", prompt="To Chinese: {en} {}").values()
    assert text_of(found[0], 0) == 'To Chinese: He said "hi". {}'
    assert text_of(found[0]) == "他说“嗨”。"


def test_documents_splits_groups_and_gzip(root):
    rows = [{"document": f"text {n}", "split": ("train", "dev", None)[n % 3]} for n in range(9)]
    path = write_jsonl(root / "a.jsonl", *rows)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    found = prepare(root, root / "a.jsonl.gz")
    assert sorted(text_of(document) for document, _ in found.values()) == [f"text {n}" for n in (0, 2, 3, 5, 6, 8)]
    assert all(document["task"] == "text" for document, _ in found.values())
    assert sorted(text_of(document) for document, _ in samples(root / "out", "dev").values()) == ["text 1", "text 4", "text 7"]


def test_groups_stay_together(root):
    rows = [{"document": f"{n}", "group": f"speaker {n % 10}", "key": f"{n}"} for n in range(100)]
    prepare(root, write_jsonl(root / "a.jsonl", *rows), job={"test_share": 0.3})
    groups = {split: {int(text_of(document)) % 10 for document, _ in samples(root / "out", split).values()} for split in ("train", "test")}
    assert groups["train"] | groups["test"] == set(range(10))
    assert not groups["train"] & groups["test"]


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    return file.getvalue()


def test_instance_maps_become_mask_parts(root):
    instances = np.array([[0, 700, 700, 0], [5, 5, 0, 0], [0, 0, 0, 9]], dtype=np.uint16)
    (root / "mask.png").write_bytes(png(instances))
    (root / "none.png").write_bytes(png(np.zeros((3, 5), np.uint8)))
    table = write_csv(root / "a.csv", ["image", "mask"], ["0.jpg", "mask.png"], ["1.jpg", "none.png"])
    found = prepare(root, table, prompt="Where?")
    document, media = found["row-00000002"]
    assert document["task"] == "segmentation"
    assert document["messages"][1]["content"] == [{"type": "mask", "image": 0, "member": "1.mask.png", "labels": ["object"] * 3}]
    # numbered without gaps, in the old order: 5, 9, 700
    assert np.asarray(Image.open(io.BytesIO(media["1.mask.png"]))).tolist() == [[0, 3, 3, 0], [1, 1, 0, 0], [0, 0, 0, 2]]
    assert found["row-00000003"][0]["messages"][1]["content"][0]["labels"] == []


def test_masks_that_do_not_fit_are_skipped(root):
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 3)).save(turned, format="JPEG", exif=exif)
    (root / "turned.jpg").write_bytes(turned.getvalue())
    (root / "mask.png").write_bytes(png(np.ones((3, 4), np.uint8)))
    (root / "rgb.png").write_bytes(png(np.ones((3, 4, 3), np.uint8)))
    rows = [
        ["0.jpg", "mask.png"],
        ["1.jpg", "mask.png"],
        ["0.jpg", "rgb.png"],
        ["0.jpg", "1.jpg"],
        ["turned.jpg", "mask.png"],
        ["", "mask.png"],
    ]
    found = prepare(root, write_csv(root / "a.csv", ["image", "mask"], *rows), prompt="Where?")
    assert list(found) == ["row-00000002"]
    assert [reason for _, _, reason in sorted(omitted(root / "out"))] == [
        "mask.png has 4 x 3 pixels, its picture 5 x 3",
        "rgb.png is PNG of mode RGB; a mask is a PNG of one channel of numbers",
        "1.jpg is JPEG of mode RGB; a mask is a PNG of one channel of numbers",
        "turned.jpg is turned by its EXIF orientation 6, so that coordinates would not fit; store it upright",
        "nothing is asked about: image is empty",
    ]


def test_samples_without_answers_need_none_and_keep_none(root):
    table = write_csv(root / "a.csv", ["image", "label", "voice"], ["0.jpg", "a", "x"], ["1.jpg", "", "y"])
    found = prepare(root, table, ("voice", "metadata"), answers="drop", task="classification")
    assert {document["voice"]: [message["role"] for message in document["messages"]] for document, _ in found.values()} == {
        "x": ["user"],
        "y": ["user"],
    }
    assert [reason for _, _, reason in omitted(root / "out")] == ["column label is not used"]
    with pytest.raises(ConfigError, match="samples without answers do not say their task; name it with --task"):
        prepare(root, table, answers="drop")
    with pytest.raises(ConfigError, match="a document is all answer"):
        prepare(root, write_csv(root / "b.csv", ["text"], ["a"]), ("text", "document"), answers="drop", task="text")


def test_rows_that_are_no_samples_are_named(root):
    lines = [
        '{"image": "0.jpg", "label": "a"}',
        '{"image": "gone.jpg", "label": "a"}',
        '{"image": "../../etc/passwd", "label": "a"}',
        '{"image": "/etc/passwd", "label": "a"}',
        '{"image": 7, "label": "a"}',
        '{"image": "0.flac", "label": "a"}',
        '{"image": "0.jpg", "label": ""}',
        '{"image": "0.jpg"}',
        '{"image": "0.jpg", "label": 0.5}',
        '{"image": "0.jpg", "label": "\\ud83d"}',
        '{"image": "0.jpg", "label": "a", "key": 1.5}',
        "{broken",
        "[1]",
        '{"image": "0.jpg", "label": 7, "key": 12}',
        '{"image": "", "label": "a", "key": "no-picture"}',
        '{"label": "a", "key": "nothing"}',
    ]
    (root / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n\n{"label": "\xff"}\n')
    found = prepare(root, root / "a.jsonl")
    assert {key: text_of(document) for key, (document, _) in found.items()} == {"row-00000001": "a", "12": "7"}
    reasons = {key: reason for key, _, reason in omitted(root / "out")}
    expected = {
        2: "there is no file",
        3: "'../../etc/passwd' lies outside of",
        4: "'/etc/passwd' lies outside of",
        5: "'7' is int, not the path of a file",
        6: "0.flac is no JPEG, PNG or WebP file",
        7: "no answer: nothing in label",
        8: "no answer: nothing in label",
        9: "column label: '0.5' is float, not text",
        10: "surrogates not allowed",
        11: "column key: '1.5' is float, not text",
        12: "line 12 is not JSON",
        13: "line 13 is list, not a JSON object",
        18: "line 18 is not UTF-8",
    }
    # A task's own prompt about no picture would be one question with many answers.
    for key in ("no-picture", "nothing"):
        assert reasons.pop(key) == "nothing is asked about: image is empty"
    assert reasons.keys() == {f"row-{number:08}" for number in expected}
    for number, reason in expected.items():
        assert reason in reasons[f"row-{number:08}"]


def test_csv_rows_of_another_length_are_named(root):
    (root / "a.csv").write_bytes(b"image,label\n0.jpg,a\n0.jpg\n\n1.jpg,b,c\n1.jpg,\xe9\n")
    assert len(prepare(root, root / "a.csv")) == 1
    assert [reason for _, _, reason in sorted(omitted(root / "out"))] == [
        "line 3 has 1 values for 2 columns",
        "line 5 has 3 values for 2 columns",
        "line 6 is not UTF-8",
    ]


def test_files_without_a_header_get_their_columns(root):
    write_tsv(root / "a.tsv", ["0.flac", "一共"], ["1.flac", "一时"])
    found = prepare(root, root / "a.tsv", columns=("audio", "answer"), task="speech_recognition")
    assert sorted(text_of(document) for document, _ in found.values()) == ["一共", "一时"]


def test_absolute_paths_need_the_root(root):
    table = write_csv(root / "a.csv", ["image", "label"], [str(root / "0.jpg"), "a"])
    assert len(prepare(root, table)) == 1
    (root / "elsewhere").mkdir()
    write_shards("manifest", root / "out2", input=table, root=root / "elsewhere")
    assert "lies outside of" in omitted(root / "out2")[0][2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"map": (("file", "image"),)}, ConfigError, r"--map file=image: .* has no column 'file'; its columns are image, label"),
        ({"map": (("label", "picture"),)}, ConfigError, r"--map label=picture: there is no field 'picture'; the fields are image, audio"),
        (
            {"map": (("image", "label"), ("label", "label"))},
            ConfigError,
            r"--map fills the field 'label' from image, label; name one column",
        ),
        ({"map": (("label", "metadata"),)}, ConfigError, r"no column of .* is an answer \(label, answer.*it has image, label"),
        ({"map": (("label", "document"),)}, ConfigError, "a document stands alone, and image are filled as well"),
        ({"map": (("label", "answer"),)}, ConfigError, "the fields answer, image fit several tasks; name one with --task"),
        ({"map": (("label", "mask"), ("image", "metadata")), "prompt": "?"}, ConfigError, "a mask needs one picture"),
        ({"map": (("image", "metadata"),), "task": "sentiment"}, ConfigError, "no column of .* is asked about"),
        ({"prompt": "What is {that}?"}, ConfigError, r"--prompt holds \{that\}, and .* its columns are image, label"),
        ({"root": "absent"}, ConfigError, "the input .*absent does not exist"),
        ({"prompts": "x"}, ConfigError, "the source manifest takes no prompts; it takes map, columns, task, prompt, answers, root, input"),
        ({"input": "absent.csv"}, ConfigError, r"the input .*absent\.csv does not exist"),
        ({"input": "."}, ConfigError, "is a folder, wanted is a file"),
        ({"input": "0.jpg"}, ConfigError, r"0\.jpg ends in \.jpg; name a \.csv, \.tsv or \.jsonl file"),
        ({"input": "empty.csv"}, ConfigError, r"empty\.csv has the columns \[\]"),
        ({"input": "twice.csv"}, ConfigError, r"has the columns \['a', 'a'\]; name each once"),
        ({"input": "a.jsonl", "columns": ("a",)}, ConfigError, "names its columns in every line"),
        ({"input": "cut.csv.gz"}, DataError, r"cut\.csv\.gz is no whole gzip file"),
        ({"input": "no.csv.gz"}, DataError, "the input of manifest cannot be read: .*[Nn]ot a gzipped file"),
        ({"input": "wide.csv"}, DataError, "wide.csv line 2: field larger than field limit"),
        ({"input": "same.jsonl"}, DataError, "key 'a' belongs to 2 records"),
        ({"input": "header.csv"}, DataError, "the source holds no sample"),
    ],
)
def test_what_cannot_be_read_is_one_line(root, options, error, message):
    write_csv(root / "a.csv", ["image", "label"], ["0.jpg", "a"])
    write_jsonl(root / "a.jsonl", {"image": "0.jpg", "label": "a"})
    write_jsonl(root / "same.jsonl", {"image": "0.jpg", "label": "a", "key": "a"}, {"image": "1.jpg", "label": "b", "key": "a"})
    (root / "empty.csv").touch()
    (root / "twice.csv").write_text("a,a\n")
    (root / "header.csv").write_text("image,label\n")
    (root / "no.csv.gz").write_text("plain")
    (root / "wide.csv").write_text("image,label\n0.jpg," + "x" * 200_000)
    (root / "cut.csv.gz").write_bytes(gzip.compress(b"image,label\n" + bytes(1000))[:-9])
    paths = {name: root / options[name] for name in ("input", "root") if name in options}
    with pytest.raises(error, match=message) as raised:
        write_shards("manifest", root / "out", **{"input": root / "a.csv", **options, **paths})
    assert "\n" not in str(raised.value)
    assert not list(root.glob("out/*"))
