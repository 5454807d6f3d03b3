import io
import json
import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import soundfile

from megamm.config import Data, Dataset
from megamm.core.errors import DataError
from megamm.prepare.tokenizer import texts
from megamm.tasks import TASKS
from megamm.tasks.reply import stored_reply
from megamm.tasks.template import parse_sample, split_answer
from tests.support.preparing import files, samples, text_of, write_shards

SMALL = {"accents": ("en-us", "en-029"), "train_variants": ("m1", "f2"), "test_variants": ("f3",)}
EXTRAS = {"digits": "sklearn", "words": "espeakng_loader"}
SOURCES = ("digits", "digit_text", "words")


def prepare(source, folder, seed=0):
    if source in EXTRAS:
        pytest.importorskip(EXTRAS[source])
    write_shards(source, folder, job={"seed": seed}, **(SMALL if source == "words" else {}))


def shards_of(*patterns):
    return Data(train={f"part{number}": Dataset(str(pattern)) for number, pattern in enumerate(patterns)})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Each source once, for the tests that only read it."""
    base = tmp_path_factory.mktemp("prepared")
    done = set()

    def get(source):
        if source not in done:
            prepare(source, base / source)
            done.add(source)
        return base / source

    return get


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_decides_every_byte(source, prepared, tmp_path):
    prepare(source, tmp_path / "again")
    prepare(source, tmp_path / "other", seed=1)
    first, again, other = (files(folder) for folder in (prepared(source), tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


@pytest.mark.parametrize("source", SOURCES)
def test_every_sample_is_valid_and_in_one_part(source, prepared):
    parts = {split: samples(prepared(source), split) for split in ("train", "test")}
    contents = {
        split: {(json.dumps(document["messages"]), *media.values()) for document, media in found.values()} for split, found in parts.items()
    }
    assert not contents["train"] & contents["test"]
    for key, (document, _) in chain(*(found.items() for found in parts.values())):
        sample = parse_sample(key, document, where=key)
        if sample.task != "text":
            _, answer = split_answer(sample.messages)
            assert TASKS[sample.task].parse(stored_reply(answer, {})) == document["label"]


def test_digits_are_the_pictures_of_scikit_learn(prepared):
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    digits = datasets.load_digits()
    parts = {split: samples(prepared("digits"), split) for split in ("train", "test")}
    assert sum(map(len, parts.values())) == len(digits.target) == 1797
    for document, media in chain(*(found.values() for found in parts.values())):
        pixels = np.asarray(Image.open(io.BytesIO(media["0.png"])))
        assert document["label"] == str(digits.target[document["index"]])
        assert np.array_equal(np.rint(pixels / (255 / 16)), digits.images[document["index"]])
    held_out = Counter(document["label"] for document, _ in parts["test"].values())
    assert len(held_out) == 10
    assert max(held_out.values()) - min(held_out.values()) <= 3  # every fifth of classes of 174 to 183 pictures


def test_words_are_clean_clips_of_separate_voices(prepared):
    parts = {split: samples(prepared("words"), split) for split in ("train", "test")}
    assert (len(parts["train"]), len(parts["test"])) == (2 * 2 * 10 * 2, 1 * 2 * 10)
    variants = {split: {document["variant"] for document, _ in found.values()} for split, found in parts.items()}
    assert variants == {"train": {"m1", "f2"}, "test": {"f3"}}
    for document, media in chain(*(found.values() for found in parts.values())):
        wave, rate_hz = soundfile.read(io.BytesIO(media["0.flac"]))
        assert (rate_hz, wave.ndim) == (16000, 1)
        assert 0.1 < len(wave) / rate_hz < 1.5
        assert np.abs(wave).max() == pytest.approx(0.9, abs=1e-4)
        edge = int(0.02 * rate_hz)
        assert np.abs(wave[: 2 * edge]).max() > 0.01  # no silence is left beyond the margin
        assert np.abs(wave[-2 * edge :]).max() > 0.01
        assert document["voice"] == f"{document['accent']}+{document['variant']}"
    takes = Counter((document["voice"], document["label"]) for document, _ in parts["train"].values())
    assert set(takes.values()) == {2}
    assert len({(document["rate"], document["pitch"]) for document, _ in parts["train"].values()}) > 60


def sentences(folder):
    return [text_of(document) for split in ("train", "test") for document, _ in samples(folder, split).values()]


def test_digit_text_is_varied_and_not_repeated(prepared):
    found = sentences(prepared("digit_text"))
    assert 300 <= len(found) == len(set(found)) <= 1500
    assert {"The word seven names the digit 7.", "9 + 9 = 18."} <= set(found)
    topics = {document["topic"] for document, _ in samples(prepared("digit_text")).values()}
    assert topics == {"name", "picture", "sound", "order", "sum", "count"}


def test_sums_are_right(prepared):
    sums = [sentence for sentence in sentences(prepared("digit_text")) if " = " in sentence]
    assert sums
    for sentence in sums:
        left, right = sentence.rstrip(".").split(" = ")
        first, operator, second = left.split()
        assert int(first) + (int(second) if operator == "+" else -int(second)) == int(right)


def test_texts_yields_prompts_answers_and_documents(prepared):
    digits = list(texts(shards_of(prepared("digits") / "test-*.tar")))
    assert digits[0] == "Which digit is this?"
    assert set(digits[1::2]) == set("0123456789")
    together = list(texts(shards_of(prepared("digit_text") / "train-*.tar", prepared("digits") / "test-*.tar")))
    assert together[-len(digits) :] == digits
    assert any("names the digit" in text for text in together)


def test_texts_names_what_is_missing_or_changed(prepared, tmp_path, caplog):
    with pytest.raises(DataError, match=r"no shard matches .*absent-\*\.tar"):
        list(texts(shards_of(tmp_path / "absent-*.tar")))
    prepare("digit_text", tmp_path)
    path = tmp_path / "test-00000.tar"
    whole = list(texts(shards_of(path)))
    path.write_bytes(path.read_bytes().replace(b'"task":"text"', b'"task":"TEXT"', 1))
    with caplog.at_level("WARNING", logger="megamm"):
        assert len(list(texts(shards_of(path)))) == len(whole) - 1
    assert re.search(r"sample text-\d+ of shard .*test-00000\.tar cannot be read: the bytes of .* changed", caplog.text)
