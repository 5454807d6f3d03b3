"""Shards in the wild become the chats that our own form would hold, without being rewritten."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import AudioFeatures, Augment, Data, Dataset, Limits, SampleMapping, from_dict, to_dict
from megamm.core.errors import ConfigError
from megamm.core.types import Sample
from megamm.data.ledger import BadSample
from megamm.data.loading.held_out import HeldOut, held_out_batches
from megamm.data.loading.source import SampleSource
from megamm.data.media.features import MediaRules
from megamm.data.planning.plan import DataPlan
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.lengths import ensure_lengths, lengths_key, load_lengths, plan_lengths
from megamm.data.samples.mapping import OWN_FORM, SampleForm
from megamm.data.shards.index import write_index
from megamm.data.shards.reader import LocalReader
from megamm.evaluation.held_out import list_places, read_samples
from megamm.prepare.tokenizer import texts
from megamm.tasks import TASKS, template
from tests.data.conftest import BATCH, MODEL
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar

CAPTION = SampleMapping(task="captioning", image="jpg|png|webp", prompt="Describe it.", answer="txt")
IMG2DATASET = SampleMapping(task="captioning", image="jpg", answer="json:caption")
CLASSES = SampleMapping(task="classification", image="jpg", answer="cls", classes=("cat", "dog", "ship"))
SPEECH = SampleMapping(task="speech_recognition", audio="flac|wav|mp3|ogg", answer="txt")
SPEECH_JSON = SampleMapping(task="speech_recognition", audio="mp3", answer="json:meta.text")
TEXT = SampleMapping(task="text", answer="txt")
TEXT_JSON = SampleMapping(task="text", answer="json:text")


def form_of(mapping: SampleMapping | None, root: Path = Path(), **limits: int) -> SampleForm:
    return SampleForm.of("wild", Dataset("x", mapping=mapping), Data(root=str(root), limits=Limits(**limits)))


def read(mapping: SampleMapping, files: Mapping[str, bytes], **limits: int) -> Sample:
    return form_of(mapping, **limits).sample("key", files, list(files), shard="wild.tar")


def ours(document: Mapping) -> Sample:
    return template.parse_sample("key", document, where="here")


ASK = {"type": "text", "text": "Describe it."}
EXAMPLES = {
    "caption": (CAPTION, {"jpg": b"P", "txt": b" A cat.\n"}, chat([{"type": "image", "member": "jpg"}, ASK], "A cat.", "captioning")),
    "other ending": (CAPTION, {"PNG": b"P", "TXT": b"A cat."}, chat([{"type": "image", "member": "PNG"}, ASK], "A cat.", "captioning")),
    "img2dataset": (
        IMG2DATASET,
        {"jpg": b"P", "json": b'{"caption": "A cat.", "status": "success", "similarity": NaN}', "txt": b"A cat."},
        chat([{"type": "image", "member": "jpg"}, {"type": "text", "text": TASKS["captioning"].prompt}], "A cat.", "captioning"),
    ),
    "speech": (
        SPEECH,
        {"flac": b"S", "txt": "\ufeffseven".encode()},
        chat(
            [{"type": "audio", "member": "flac"}, {"type": "text", "text": TASKS["speech_recognition"].prompt}],
            "seven",
            "speech_recognition",
        ),
    ),
    "speech in a field": (
        SPEECH_JSON,
        {"mp3": b"S", "json": b'\xef\xbb\xbf{"meta": {"text": "seven"}}'},
        chat(
            [{"type": "audio", "member": "mp3"}, {"type": "text", "text": TASKS["speech_recognition"].prompt}],
            "seven",
            "speech_recognition",
        ),
    ),
    "text": (TEXT, {"txt": b" two\nlines\n"}, text_document(" two\nlines\n")),
    "text in a field": (TEXT_JSON, {"json": b'{"text": "words"}'}, text_document("words")),
    "question": (
        SampleMapping(task="answering", image="jpg", prompt="Look.", question="json:q", answer="json:a"),
        {"jpg": b"P", "json": b'{"q": "How many?", "a": 3}'},
        chat(
            [{"type": "image", "member": "jpg"}, {"type": "text", "text": "Look."}, {"type": "text", "text": "How many?"}], "3", "answering"
        ),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_wild_samples_are_the_chats_of_our_own_form(name):
    mapping, files, document = EXAMPLES[name]
    found, expected = read(mapping, files), ours(document)
    assert (found.task, found.messages) == (expected.task, expected.messages)
    assert set(found.media) == {suffix for suffix, content in files.items() if content in (b"P", b"S")}
    form = form_of(mapping)
    needed = form.needed(list(files))
    assert needed is not None and set(needed) >= set(found.media)
    # Planning reads texts alone and sees the same chat.
    only_texts = {suffix: files[suffix] for suffix in form.needed(list(files), media=False) or ()}
    assert form.sample("key", only_texts, list(files), shard="wild.tar").messages == expected.messages


def test_fields_beside_the_answer_become_metadata():
    assert read(TEXT_JSON, {"json": b'{"text": "words", "source": "a book"}'}).metadata["source"] == "a book"


@pytest.mark.parametrize(("written", "expected"), [("1", "dog"), ("dog\n", "dog"), ("02", "ship"), ("cat", "cat")])
def test_classes_by_number_and_by_name(written, expected, tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffcat\ndog\r\nship\n\n", encoding="utf-8")
    for form in (form_of(CLASSES), form_of(replace(CLASSES, classes="names.txt"), tmp_path)):
        sample = form.sample("key", {"jpg": b"P", "cls": written.encode()}, ["jpg", "cls"], shard="wild.tar")
        (answer,) = sample.messages[-1].content
        assert (answer.type, answer.text) == ("label", expected)
    numbers = read(replace(CLASSES, answer="json:label"), {"jpg": b"P", "json": b'{"label": 2}'})
    assert numbers.messages[-1].content[0].text == "ship"


@pytest.mark.parametrize(
    ("mapping", "files", "message"),
    [
        (CAPTION, {"txt": b"x"}, r"there is no key\.jpg\|png\|webp, which mapping\.image names"),
        (CAPTION, {"jpg": b"P"}, r"key\.txt is missing, which mapping\.answer names"),
        (CAPTION, {"jpg": b"P", "txt": b" \n"}, r"key\.txt is empty"),
        (CAPTION, {"jpg": b"P", "txt": b"\xff\xfe"}, r"key\.txt is not UTF-8 \(invalid start byte at byte 0\)"),
        (IMG2DATASET, {"jpg": b"P", "json": b"{"}, "not JSON"),
        (IMG2DATASET, {"jpg": b"P", "json": b"[]"}, "list, not a JSON object"),
        (IMG2DATASET, {"jpg": b"P", "json": b"{}"}, "has no field caption"),
        (IMG2DATASET, {"jpg": b"P", "json": b'{"caption": null}'}, "field caption is NoneType, not a text"),
        (IMG2DATASET, {"jpg": b"P", "json": b'{"caption": true}'}, "field caption is bool, not a text"),
        (IMG2DATASET, {"jpg": b"P", "json": b'{"caption": "\\ud800"}'}, "half of a surrogate pair"),
        (SPEECH_JSON, {"mp3": b"S", "json": b'{"meta": "text"}'}, r"has no field meta\.text"),
        (CLASSES, {"jpg": b"P", "cls": b"3"}, "class '3' is not among the 3"),
        (CLASSES, {"jpg": b"P", "cls": b"-1"}, "class '-1' is not among the 3"),
        (CLASSES, {"jpg": b"P", "cls": "٢".encode()}, "is not among the 3"),
        (CLASSES, {"jpg": b"P", "cls": b"9" * 5000}, "is not among the 3"),
    ],
)
def test_samples_that_do_not_fit_say_why(mapping, files, message):
    with pytest.raises(BadSample, match=message) as error:
        read(mapping, files)
    assert str(error.value).startswith("wild.tar key")


def test_foreign_samples_without_a_mapping_say_what_is_missing():
    with pytest.raises(BadSample, match=r"there is no key\.json; samples of another form need the dataset's `mapping`"):
        OWN_FORM.sample("key", {"txt": b"x"}, ["txt"], shard="wild.tar")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": ""}, "mapping.answer='' names no member"),
        ({"answer": "TXT"}, "mapping.answer='TXT' names no member"),
        ({"answer": "json:"}, "mapping.answer='json:' names no member"),
        ({"answer": "json:a..b"}, "names no member"),
        ({"answer": "../txt"}, "names no member"),
        ({"image": "txt"}, "mapping.image='txt' names no image"),
        ({"image": "json:url"}, "names no image"),
        ({"audio": "jpg"}, "mapping.audio='jpg' names no audio"),
        ({"task": "Caption it"}, "is not a name of small letters"),
        ({"task": "text"}, "of task text is a plain document"),
        ({"image": "", "prompt": ""}, "leaves nothing to answer"),
        ({"classes": "absent.txt"}, r"absent.txt cannot be read"),
        ({"classes": ("cat", " ")}, "class 1 has no name"),
        ({"classes": ("1", "0")}, "class 0 is named '1', so that a number could mean two classes"),
    ],
)
def test_mappings_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        form_of(replace(CAPTION, **changes))
    assert str(error.value).startswith("dataset wild: mapping")


def test_numbers_that_name_themselves_are_classes():
    digits = replace(CLASSES, classes=tuple(map(str, range(10))))
    assert read(digits, {"jpg": b"P", "cls": b"7"}).messages[-1].content[0].text == "7"


def test_every_part_of_a_mapping_is_in_its_fingerprint(tmp_path, tokenizer):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    named = replace(CLASSES, classes="names.txt")
    forms = [form_of(CAPTION), form_of(IMG2DATASET), form_of(CLASSES), form_of(replace(CAPTION, prompt="What?")), OWN_FORM]
    forms += [form_of(named, tmp_path), form_of(CAPTION, members=5)]
    (tmp_path / "names.txt").write_text("cat\nship\n")
    forms.append(form_of(named, tmp_path))
    rules = MediaRules.of(MODEL, Data())
    keys = {lengths_key(tokenizer, rules, form=form) for form in forms} | {lengths_key(tokenizer, rules, speeds=(0.9, 1.0))}
    assert len({form.fingerprint for form in forms}) == len(forms) and len(keys) == len(forms) + 1
    # Written in the recipe or in a file, the same classes are the same form.
    assert form_of(named, tmp_path).classes == form_of(replace(CLASSES, classes=("cat", "ship"))).classes


def test_a_mapping_is_read_from_a_recipe_and_archived():
    from megamm.config import load_recipe

    table = to_dict(load_recipe("tiny"))
    table["data"]["train"]["wild"] = {
        "shards": "x.tar",
        "mapping": {"task": "classification", "image": "jpg", "answer": "cls", "classes": ["a"]},
    }
    table["data"]["limits"] = {"pixels": 100}
    recipe = from_dict(table)
    assert recipe.data.train["wild"].mapping == replace(CLASSES, classes=("a",))
    assert from_dict(to_dict(recipe)) == recipe and recipe.data.limits.pixels == 100
    table["data"]["train"]["wild"]["mapping"]["classes"] = "names.txt"
    assert from_dict(table).data.train["wild"].mapping == replace(CLASSES, classes="names.txt")


def test_the_recipes_of_the_documentation_are_read():
    from megamm.config import load_recipe

    page = Path(__file__).parents[3].joinpath("docs/data-formats.md").read_text(encoding="utf-8")
    datasets = {}
    for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        table = to_dict(load_recipe("tiny"))
        table["data"] = tomli.loads(block)["data"]
        data = from_dict(table).data
        datasets |= {name: SampleForm.of(name, dataset, data) for name, dataset in data.train.items()}
    assert {"captions", "classes", "speech", "books", "words", "photos"} == set(datasets)
    rows = re.findall(r"^\| .* \| (`\..*) \| (`(?:task|image|audio) = .*) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    for members, mapping in rows:
        fields = tomli.loads("\n".join(re.findall(r'`(\w+ = "[^`]*")`', mapping)))
        form = form_of(SampleMapping(**{"task": "captioning"} | fields))
        suffixes = [suffix.removeprefix(".") for suffix in re.findall(r"`(\.\w+)`", members)]
        assert set(form.needed(suffixes) or ()) <= set(suffixes)
        assert len(form.needed(suffixes) or ()) >= len(
            {value.split(":")[0] for name, value in fields.items() if name in ("image", "audio", "answer")}
        )
    defaults = Limits()
    for name, text in re.findall(r"^\| `(\w+)` \| ([\d,]+(?: MiB)?) \|", page, re.MULTILINE):
        number = int(text.removesuffix(" MiB").replace(",", "")) << (20 if text.endswith("MiB") else 0)
        assert getattr(defaults, name) == number
    assert "`messages`, `parts` | 4096, 16,384" in page and (defaults.messages, defaults.parts) == (4096, 16_384)


_TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@given(_TEXTS, _TEXTS.filter(str.strip), st.sampled_from(["txt", "json:a", "json:a.b"]))
def test_any_text_is_read_as_our_own_form_reads_it(prompt, answer, place):
    mapping = SampleMapping(task="captioning", image="jpg", prompt=prompt, answer=place)
    nested: object = answer
    for field in reversed(place.split(":")[-1].split(".") if ":" in place else []):
        nested = {field: nested}
    content = answer.encode() if place == "txt" else json.dumps(nested).encode()
    if place == "txt":
        answer = content.decode("utf-8-sig")
    if not answer.strip():
        return
    question = [{"type": "image", "member": "jpg"}, {"type": "text", "text": prompt or TASKS["captioning"].prompt}]
    expected = ours(chat(question, answer.strip(), "captioning"))
    assert read(mapping, {"jpg": b"P", place.split(":")[0]: content}).messages == expected.messages


@given(st.dictionaries(st.sampled_from(["jpg", "txt", "json", "cls", "flac", "mp3"]), st.binary(max_size=20)))
def test_whatever_members_hold_is_a_sample_or_a_reason(files):
    for mapping in (CAPTION, IMG2DATASET, CLASSES, SPEECH, SPEECH_JSON, TEXT, TEXT_JSON, None):
        try:
            sample = form_of(mapping).sample("key", files, list(files), shard="wild.tar")
        except BadSample as error:
            assert str(error).startswith("wild.tar key") and "\n" not in str(error)
        else:
            assert sample.messages[-1].role == "assistant"


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> Path:
    """The same pictures and sounds in our own form and in forms of the wild."""
    root = tmp_path_factory.mktemp("wild")
    own, captions, classes, speech = {}, {}, {}, {}
    for number in range(12):
        picture, words = jpeg(20 + number, 30, seed=number), f"the cat is number {number}"
        own[f"k{number:02}"] = as_files(chat([{"type": "image", "member": "0.jpg"}, ASK], words, "captioning"), _0_jpg=picture)
        captions[f"k{number:02}"] = {"jpg": picture, "json": json.dumps({"url": "x"}).encode(), "txt": words.encode()}
        classes[f"k{number:02}"] = {"jpg": picture, "cls": b"%d" % (number % 3)}
        speech[f"k{number:02}"] = {"wav": flac(9000 + 500 * number, format="WAV"), "json": b'{"text": "seven"}'}
    for name, samples in (("own", own), ("captions", captions), ("classes", classes), ("speech", speech)):
        write_index(write_tar(root / f"{name}.tar", samples))
    return root


SPEEDS = (0.9, 1.0, 1.1)
MAPPINGS = {"own": None, "captions": CAPTION, "classes": CLASSES, "speech": replace(SPEECH, audio="wav", answer="json:text")}


def data_of(wild: Path, **changes) -> Data:
    datasets = {name: Dataset(f"{name}.tar", mapping=mapping) for name, mapping in MAPPINGS.items()}
    datasets["speech"] = replace(datasets["speech"], augment=Augment(audio_speeds=SPEEDS, audio_gain_db=3.0))
    return replace(Data(root=str(wild), train=datasets, held_out=datasets, window=64, row_patches=64, row_frames=400), **changes)


@pytest.fixture(scope="module")
def planned(wild, tokenizer) -> Data:
    data, rules = data_of(wild), MediaRules.of(MODEL, Data())
    for name, dataset in data.train.items():
        form = SampleForm.of(name, dataset, data)
        for speeds in {dataset.augment.audio_speeds, (1.0,)}:
            ensure_lengths([wild / f"{name}.tar"], tokenizer, rules, form=form, speeds=speeds)
    return data


def test_mapped_shards_give_the_sequences_of_our_own(wild, planned, tokenizer):
    plan = DataPlan.open(planned, BATCH, model=MODEL, tokenizer=tokenizer, seed=3)
    source = SampleSource(plan.datasets, SampleEncoder(tokenizer, plan.rules), LocalReader())
    step = plan.next_step(plan.start())
    sequences = {"own": {}, "captions": {}, "classes": {}, "speech": {}}
    for _ in range(20):
        for sample in (one for row in step.rows for one in row.samples if one.dataset != "speech"):
            sequences[sample.dataset][sample.index] = source.load(sample)
        step = plan.next_step(step.state)
    assert len(sequences["own"]) == len(sequences["captions"]) == len(sequences["classes"]) == 12
    for index, own in sequences["own"].items():
        mapped = sequences["captions"][index]
        assert mapped.key == own.key and np.array_equal(mapped.input_ids, own.input_ids) and np.array_equal(mapped.labels, own.labels)
        assert np.array_equal(mapped.images[0].pixels, own.images[0].pixels)
        assert tokenizer.decode(sequences["classes"][index].input_ids.tolist()).endswith(("cat", "dog", "ship")[index % 3])


def test_speeds_are_drawn_by_the_planner_and_decoded_as_planned(planned, tokenizer):
    plan = DataPlan.open(planned, BATCH, model=MODEL, tokenizer=tokenizer, seed=3)
    augment = {name: dataset.augment for name, dataset in planned.train.items()}
    source = SampleSource(plan.datasets, SampleEncoder(tokenizer, plan.rules), LocalReader(), augment=augment, seed=plan.seed)
    assert plan.datasets["speech"].lengths.shape == (12, 3, 3) and plan.datasets["own"].lengths.shape == (12, 1, 3)
    state, frames = plan.start(), {}
    for _ in range(30):
        step = plan.next_step(state)
        state = step.state
        for sample in (one for row in step.rows for one in row.samples if one.dataset == "speech"):
            sequence = source.load(sample)
            assert sequence.audios[0].mel.shape[1] == sample.frames and len(sequence.input_ids) == sample.tokens
            frames.setdefault(sample.index, {})[sample.variant] = sample.frames
    all_speeds = [one for one in frames.values() if len(one) == 3]
    assert all_speeds and all(one[0] > one[1] > one[2] for one in all_speeds)


def test_held_out_data_use_the_mapping_and_no_speed(planned, tokenizer):
    held_out = HeldOut(planned, BATCH, model=MODEL, tokenizer=tokenizer)
    assert held_out.datasets["speech"].lengths.shape == (12, 1, 3)
    batches = list(held_out_batches(held_out))
    assert sum(len(row) for batch in batches for row in batch.keys) == 48


def test_evaluation_and_tokenizer_training_use_the_mapping(wild, planned):
    forms = {name: SampleForm.of(name, dataset, planned) for name, dataset in planned.held_out.items()}
    places = list_places({"captions": str(wild / "captions.tar"), "speech": str(wild / "speech.tar")})
    samples = [sample for _, sample in read_samples(places, forms)]
    assert len(samples) == 24 and all(isinstance(sample, Sample) and sample.media for sample in samples)
    captions, classes = (list(texts(replace(planned, train={name: planned.train[name]}))) for name in ("captions", "classes"))
    assert captions[:2] == ["Describe it.", "the cat is number 0"] and classes.count("dog") == 4


def test_a_sound_may_be_too_long_for_a_row_at_one_speed_only(tmp_path, tokenizer):
    tar = write_tar(tmp_path / "x.tar", {"a": {"wav": flac(16000 * 3, format="WAV"), "json": b'{"text": "seven"}'}})
    write_index(tar)
    rules = MediaRules(None, AudioFeatures(num_mel=16, max_seconds=3.0))
    form = form_of(MAPPINGS["speech"])
    lengths = plan_lengths(tar, tokenizer, rules, form=form, speeds=(0.5, 1.0, 2.0))
    # The limit is one of the sound, not of how it is played.
    assert lengths.lengths[0, :, 2].tolist() == [600, 300, 150] and not lengths.problems
    ensure_lengths([tar], tokenizer, rules, form=form, speeds=(0.5, 1.0, 2.0))
    stored = load_lengths(tar, lengths_key(tokenizer, rules, form=form, speeds=(0.5, 1.0, 2.0)))
    assert np.array_equal(stored.lengths, lengths.lengths)
