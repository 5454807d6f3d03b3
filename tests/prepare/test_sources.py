import io
import json
import tarfile
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import soundfile

from megamm.core.errors import DataError
from megamm.data.index import load_index
from megamm.prepare import SOURCES, texts
from megamm.tasks import TASKS
from megamm.tasks.template import parse_sample, split_answer

SMALL = {"accents": ("en-us", "en-029"), "train_variants": ("m1", "f2"), "test_variants": ("f3",)}
EXTRAS = {"digits": "sklearn", "words": "espeakng_loader"}


def prepare(source, folder, seed=0):
    if source in EXTRAS:
        pytest.importorskip(EXTRAS[source])
    return SOURCES[source](folder, seed, **(SMALL if source == "words" else {}))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Each source once, for the tests that only read it."""
    base = tmp_path_factory.mktemp("prepared")
    done = {}

    def get(source):
        if source not in done:
            done[source] = prepare(source, base / source)
        return base / source

    return get


def samples(folder, part):
    """Documents of a part, and their one media member decoded by nobody."""
    for path in sorted(folder.glob(f"{part}-*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in files.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                media = [value for other, value in files.items() if other.startswith(f"{key}.") and other != name]
                yield key, json.loads(content), *media


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_decides_every_byte(source, tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        prepare(source, folder, seed)
    first, second, other = ({path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))} for folder in folders)
    assert first == second
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


@pytest.mark.parametrize("source", SOURCES)
def test_every_sample_is_valid_indexed_and_in_one_part(source, prepared):
    folder = prepared(source)
    for path in folder.glob("*.tar"):
        assert load_index(path, verify_digest=True).problems == {}
    contents = {part: [(json.dumps(sample[1]["messages"]), *sample[2:]) for sample in samples(folder, part)] for part in ("train", "test")}
    assert not set(contents["train"]) & set(contents["test"])
    for key, document, *_ in chain(samples(folder, "train"), samples(folder, "test")):
        sample = parse_sample(key, document, where=key)
        if sample.task != "text":
            _, answer = split_answer(sample.messages)
            assert TASKS[sample.task].parse(answer) == document["label"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_second_run_is_refused(source, prepared):
    folder = prepared(source)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(DataError, match=r"already holds"):
        prepare(source, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_digits_are_the_pictures_of_scikit_learn(prepared):
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    digits = datasets.load_digits()
    parts = {part: list(samples(prepared("digits"), part)) for part in ("train", "test")}
    assert sum(map(len, parts.values())) == len(digits.target) == 1797
    for _, document, picture in chain(*parts.values()):
        pixels = np.asarray(Image.open(io.BytesIO(picture)))
        assert document["label"] == str(digits.target[document["index"]])
        assert np.array_equal(np.rint(pixels / (255 / 16)), digits.images[document["index"]])
    held_out = Counter(document["label"] for _, document, _ in parts["test"])
    assert len(held_out) == 10
    assert max(held_out.values()) - min(held_out.values()) <= 3  # every fifth of classes of 174 to 183 pictures


def test_words_are_clean_clips_of_separate_voices(prepared):
    parts = {part: list(samples(prepared("words"), part)) for part in ("train", "test")}
    assert (len(parts["train"]), len(parts["test"])) == (2 * 2 * 10 * 2, 1 * 2 * 10)
    variants = {part: {document["variant"] for _, document, _ in found} for part, found in parts.items()}
    assert variants == {"train": {"m1", "f2"}, "test": {"f3"}}
    for _, document, clip in chain(*parts.values()):
        wave, rate_hz = soundfile.read(io.BytesIO(clip))
        assert (rate_hz, wave.ndim) == (16000, 1)
        assert 0.1 < len(wave) / rate_hz < 1.5
        assert np.abs(wave).max() == pytest.approx(0.9, abs=1e-4)
        edge = int(0.02 * rate_hz)
        assert np.abs(wave[: 2 * edge]).max() > 0.01  # no silence is left beyond the margin
        assert np.abs(wave[-2 * edge :]).max() > 0.01
        assert document["voice"] == f"{document['accent']}+{document['variant']}"
    takes = Counter((document["voice"], document["label"]) for _, document, _ in parts["train"])
    assert set(takes.values()) == {2}
    assert len({(document["rate"], document["pitch"]) for _, document, _ in parts["train"]}) > 60


def test_text_is_varied_and_not_repeated(prepared):
    documents = [document for part in ("train", "test") for _, document in samples(prepared("text"), part)]
    sentences = [document["messages"][0]["content"][0]["text"] for document in documents]
    assert 300 <= len(sentences) == len(set(sentences)) <= 1500
    assert {document["topic"] for document in documents} == {"name", "picture", "sound", "order", "sum", "count"}
    assert "The word seven names the digit 7." in sentences
    assert "9 + 9 = 18." in sentences


def test_sums_are_right(prepared):
    for _, document in chain(samples(prepared("text"), "train"), samples(prepared("text"), "test")):
        sentence = document["messages"][0]["content"][0]["text"]
        if " = " in sentence:
            left, right = sentence.rstrip(".").split(" = ")
            first, operator, second = left.split()
            assert int(first) + (int(second) if operator == "+" else -int(second)) == int(right)


def test_texts_yields_prompts_answers_and_documents(prepared):
    digits = list(texts([str(prepared("digits") / "test-*.tar")]))
    assert digits[0] == "Which digit is this?"
    assert set(digits[1::2]) == set("0123456789")
    together = list(texts([str(prepared("text") / "train-*.tar"), str(prepared("digits") / "test-*.tar")]))
    assert together[-len(digits) :] == digits
    assert any("names the digit" in text for text in together)


def test_texts_names_what_is_missing_or_changed(prepared, tmp_path):
    with pytest.raises(DataError, match=r"no shard matches .*absent-\*\.tar"):
        list(texts([str(tmp_path / "absent-*.tar")]))
    prepare("text", tmp_path)
    path = tmp_path / "test-00000.tar"
    path.write_bytes(path.read_bytes().replace(b'"task":"text"', b'"task":"TEXT"', 1))
    with pytest.raises(DataError, match=r"test-00000\.tar sample 'text-\d+': the bytes of .* changed"):
        list(texts([str(path)]))
