"""What a task cannot use is left out with its reason, by planning where headers tell and else by reading: never a silent zero."""

import io
import wave
from dataclasses import replace

import pytest
from PIL import Image

from megamm.config import AudioFeatures, Data, Dataset, Head, ImageFeatures
from megamm.core.types import TokenSequence
from megamm.data.loading.source import SampleSource
from megamm.data.media.features import MediaRules
from megamm.data.planning.rows import PlannedSample
from megamm.data.samples.datasets import open_dataset
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.lengths import ensure_lengths, lengths_key, load_lengths
from megamm.data.shards.index import write_index
from megamm.data.shards.reader import LocalReader
from tests.support.shards import as_files, flac, jpeg, write_tar

PICTURE, SOUND, WAVE = {"type": "image", "member": "0.jpg"}, {"type": "audio", "member": "0.flac"}, {"type": "audio", "member": "0.wav"}
RULES = MediaRules(ImageFeatures(patch_size=4, max_patches=64), AudioFeatures(num_mel=16, max_seconds=2.0))
JPEG = jpeg(32, 16)


def wav(num_frames: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16000)
        writer.writeframes(bytes(2 * num_frames))
    return file.getvalue()


def asked(task: str, seen: list, answer: list, **media: bytes) -> dict[str, bytes]:
    question = {"role": "user", "content": [*seen, {"type": "text", "text": "what is it?"}]}
    return as_files({"task": task, "messages": [question, {"role": "assistant", "content": answer}]}, **media)


def boxes(corners: object) -> list:
    return [{"type": "boxes", "image": 0, "boxes": [{"label": "cell", "xyxy": corners}]}]


def said(text: str) -> list:
    return [{"type": "label", "text": text}]


def mask(*labels: str) -> list:
    return [{"type": "mask", "image": 0, "member": "1.png", "labels": list(labels)}]


def png(width: int, height: int, value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), value).save(file, "PNG")
    return file.getvalue()


PNG = png(32, 16, 2)
BAD = {
    "lacks its task": (as_files({"messages": []}), "has no task"),
    "lacks its messages": (as_files({"task": "classification"}), "has no messages"),
    "label of nothing": (asked("classification", [PICTURE], said(""), _0_jpg=JPEG), "not a string with something in it"),
    "label of blanks": (asked("classification", [PICTURE], said(" \n"), _0_jpg=JPEG), "the stored answer of classification is blank"),
    "words for boxes": (
        asked("detection", [PICTURE], said("two cells"), _0_jpg=JPEG),
        "holds a label part, and detection answers with boxes",
    ),
    "words for items": (asked("recommendation", [{"type": "item", "id": "cup"}], said("cup")), "recommendation answers with item"),
    "box without corners": (
        asked("detection", [PICTURE], [{"type": "boxes", "image": 0, "boxes": [{"label": "x"}]}], _0_jpg=JPEG),
        "has no xyxy",
    ),
    "box outside": (asked("detection", [PICTURE], boxes([0, 0, 33, 4]), _0_jpg=JPEG), "outside its picture"),
    "box without area": (asked("detection", [PICTURE], boxes([4, 4, 4, 8]), _0_jpg=JPEG), "no area"),
    "box of words": (asked("detection", [PICTURE], boxes([4, "x", 4, 8]), _0_jpg=JPEG), "not four numbers"),
    "box without picture": (asked("detection", [], boxes([4, 4, 5, 8])), "picture"),
    "mask of another picture": (asked("segmentation", [PICTURE], mask("n"), _0_jpg=JPEG, _1_png=png(8, 8, 1)), "8 x 8"),
    "mask with too many values": (asked("segmentation", [PICTURE], mask("n"), _0_jpg=JPEG, _1_png=PNG), "labels"),
    "mask that is absent": (asked("segmentation", [PICTURE], mask("n"), _0_jpg=JPEG), "1.png is missing"),
    "picture that is absent": (asked("captioning", [PICTURE], said("a cat")), "0.jpg is missing"),
    "sound of nothing": (asked("speech_recognition", [WAVE], said("one"), _0_wav=wav(0)), "0 samples"),
    "sound without bytes": (
        asked("speech_recognition", [SOUND], said("one"), _0_flac=b""),
        "read (Format not recognised.)",
    ),
    "sound too long": (asked("speech_recognition", [SOUND], said("one"), _0_flac=flac(40_000)), "2.5 s"),
    "item that is unknown": (asked("recommendation", [{"type": "item", "id": "cup"}], [{"type": "item", "id": "lmap"}]), "'lmap'"),
}


def reasons(folder, files: dict, tokenizer, rules=RULES) -> dict[str, str]:
    """Why each sample is left out, said by planning, or by reading what planning let through; the samples that are used are absent."""
    tar = write_tar(folder / "train-0.tar", files)
    write_index(tar)
    ensure_lengths([tar], tokenizer, rules)
    lengths = load_lengths(tar, lengths_key(tokenizer, rules))
    dataset = open_dataset("d", Dataset(shards="train-0.tar"), Data(root=str(folder)), tokenizer=tokenizer, rules=rules)
    source = SampleSource({"d": dataset}, SampleEncoder(tokenizer, rules), LocalReader())
    found = {}
    for number, name in enumerate(files):
        if number in lengths.problems:
            found[name] = lengths.problems[number]
            continue
        read = source.load(PlannedSample(0, "d", number, 0, *lengths.lengths[number, 0].tolist()))
        if not isinstance(read, TokenSequence):
            found[name] = read.reason
    source.close()
    return found


def test_each_bad_sample_is_left_out_with_its_reason_and_good_ones_stay(tmp_path, with_items):
    # One task takes whatever shows it.
    good = {
        "good": asked("recommendation", [PICTURE], [{"type": "item", "id": "cup"}], _0_jpg=JPEG),
        "a face": asked("sentiment", [PICTURE], said("joy"), _0_jpg=JPEG),
        "a word beside boxes": asked("detection", [PICTURE], [*boxes([0, 0, 4, 4]), *said("one")], _0_jpg=JPEG),
        "a text with a picture": (
            as_files(
                {"task": "text", "messages": [{"role": "assistant", "content": [PICTURE, {"type": "text", "text": "a"}]}]}, _0_jpg=JPEG
            )
        ),
        "a voice": asked("sentiment", [SOUND], said("joy, relief"), _0_flac=flac(9000)),
    }
    found = reasons(tmp_path, {**{name: files for name, (files, _) in BAD.items()}, **good}, with_items)
    assert set(found) == set(BAD)
    wrong = {name: found[name] for name, (_, part) in BAD.items() if part not in found[name] or "\n" in found[name]}
    assert not wrong


@pytest.mark.parametrize(
    ("head", "answer", "reason"),
    [
        (Head("linear", ("cat", "dog")), said("dgo"), "'dgo' is not among the 2 of model.head.labels; did you mean 'dog'"),
        (Head("detector", ("platelet",), queries="cells"), boxes([0, 0, 4, 4]), "'cell' is not among the 1 of model.head.labels"),
        (Head("segmenter", ("wall",)), mask("n"), "'n' is not among the 1 of model.head.labels"),
    ],
)
def test_labels_outside_a_heads_are_left_out(tmp_path, tokenizer, head, answer, reason):
    files = {"bad": asked("classification", [PICTURE], answer, _0_jpg=JPEG, _1_png=PNG)}
    assert reason in reasons(tmp_path, files, tokenizer, replace(RULES, head=head))["bad"]
