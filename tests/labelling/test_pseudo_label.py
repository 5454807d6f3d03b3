"""Samples that a model labels: what it says, how sure it is, what is kept, and what a command that was cut off leaves."""

import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamm.config import Head
from megamm.core.errors import ConfigError, DataError
from megamm.core.predictions import LabelScore
from megamm.core.types import Message, Part, Sample
from megamm.data.ledger import BadSample
from megamm.data.samples.encode import SampleEncoder
from megamm.data.samples.mapping import OWN_FORM, read_sample
from megamm.data.shards.index import load_index, write_index
from megamm.data.shards.reader import LocalReader, ShardReader
from megamm.evaluation.held_out import list_places, read_samples
from megamm.inference.heads import predict
from megamm.inference.load import load_model
from megamm.labelling import pseudo_label
from megamm.labelling.answers import Labelled, _of_head, ask, with_label
from megamm.labelling.source import Labeller, Originals, labelled_source, relabelled
from megamm.prepare.run import Job, prepare
from megamm.tasks.reply import Reply
from tests.support.shards import as_files, chat, jpeg, text_document, write_tar
from tests.support.tiny_run import random_model, write_run

pytestmark = pytest.mark.integration

CHECKOUT = Path(__file__).resolve().parents[2]
LABELS = ("zero", "one", "two")
ASK = [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "What digit is this?"}]


def unanswered(question: list) -> dict:
    return {"task": "classification", "messages": [{"role": "user", "content": question}], "writer": "w7"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a linear head of random weights."""
    run = tmp_path_factory.mktemp("runs") / "linear"
    write_run(run, head=Head("linear", LABELS, states="vision"))
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten pictures in two shards, of which five have an answer, and three samples that nobody can label."""
    root = tmp_path_factory.mktemp("data")
    samples = {}
    for number in range(10):
        document = chat(ASK, LABELS[number % 3]) if number % 2 else unanswered(ASK)
        samples[f"p{number}"] = as_files(document, _0_jpg=jpeg(9 + number, 12, seed=number))
    samples["document"] = as_files(text_document("a text"))
    samples["blind"] = as_files(unanswered([{"type": "text", "text": "What digit is this?"}]))
    samples["torn"] = as_files(unanswered(ASK), _0_jpg=jpeg(12, 12)[:-60])
    keys = sorted(samples)
    for number, part in enumerate((keys[:6], keys[6:])):
        write_index(write_tar(root / f"x-{number:05}.tar", {key: samples[key] for key in part}))
    return root


def written(folder: Path, split: str = "train") -> dict[str, Sample]:
    found = {}
    for tar in sorted(folder.glob(f"{split}-*.tar")):
        reader, index = LocalReader(), load_index(tar, verify_digest=True)
        shard = ShardReader(tar, index, reader)
        found |= {index.key(number): read_sample(shard, number, OWN_FORM) for number in range(index.num_samples)}
        reader.close()
    return found


def originals(data: Path) -> dict[str, Sample]:
    places = list_places({"x": str(data / "x-*.tar")})
    return {sample.key: sample for _, sample in read_samples(places)}


def test_what_the_model_is_sure_of_becomes_shards(run, data, tmp_path):
    every = pseudo_label(run, [str(data / "x-*.tar")], tmp_path / "all", threshold=1e-6, batch_size=3)
    lines = [json.loads(line) for line in (tmp_path / "all" / "answers.jsonl").read_text().splitlines()]
    sure = sorted((line["confidence"] for line in lines if line["label"]), reverse=True)
    threshold = (sure[3] + sure[4]) / 2
    report = pseudo_label(run, [str(data / "x-*.tar")], tmp_path / "some", threshold=threshold)
    assert (every.num_kept, report.num_kept, report.num_samples, report.num_labelled) == (10, 4, 13, 10)
    before, kept, loaded = originals(data), written(tmp_path / "some"), load_model(run, device="cpu")
    assert len(kept) == 4
    for key, sample in kept.items():
        (reply,) = predict(loaded, [before[key]])
        (part,) = sample.messages[-1].content
        assert (part.type, part.text) == ("label", reply.text) and sample.messages[:-1] == before[key].messages[:1]
        assert sample.metadata["confidence"] == pytest.approx(reply.labels[0].score, abs=1e-4)
        assert sample.metadata["labelled_at_step"] == 3 and sample.media == before[key].media
        assert ("writer" in sample.metadata) == (int(key[1]) % 2 == 0)
    right = {f"p{number}": LABELS[number % 3] for number in range(1, 10, 2)}
    said = {line["key"]: line["label"] for line in lines}
    assert every.num_known == 5 and every.accuracy == sum(said[key] == label for key, label in right.items()) / 5
    assert sum(one.num_kept for one in every.labels) == 10 and sum(report.reasons.values()) == 3
    assert {reason.split(",")[0] for reason in report.reasons} >= {"a plain document asks nothing"}
    assert "4 of 13 samples" in (tmp_path / "some" / "pseudo-labels.md").read_text()


def test_a_command_that_was_cut_off_goes_on_and_writes_the_same_bytes(run, data, tmp_path):
    words = {"threshold": 1e-6, "batch_size": 2}
    pseudo_label(run, [str(data / "x-*.tar")], tmp_path / "whole", **words)
    pseudo_label(run, [str(data / "x-*.tar")], tmp_path / "cut", **words)
    (kept,) = (tmp_path / "cut" / ".progress").glob("start_*.jsonl")
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:5]) + lines[5][:20])
    for path in tmp_path.glob("cut/train-*"):
        path.unlink()
    pseudo_label(run, [str(data / "x-*.tar")], tmp_path / "cut", **words)
    again = (tmp_path / "cut" / ".progress" / "start_00002.rank_00000.jsonl").read_text().splitlines()
    assert len(again) == 13 - 5
    # Shards that lie elsewhere are the same shards: all is asked again, and nothing is begun from something else.
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    assert pseudo_label(run, [str(elsewhere / "x-*.tar")], tmp_path / "cut", **words).num_kept == 10
    for path in (tmp_path / "whole").glob("train-*"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_two_ranks_label_what_one_does_by_the_command(run, data, tmp_path):
    words = ["pseudo-label", str(run), "--data", str(data / "x-*.tar"), "--threshold", "0.000001", "--batch-size", "2", "--output"]
    for num_ranks in (1, 2):
        command = [str(CHECKOUT / "launchers" / "local.sh"), str(num_ranks), "megamm", *words, str(tmp_path / str(num_ranks))]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=580)
        assert result.returncode == 0, result.stderr[-4000:]
        assert "10 of 13 samples have a label of confidence 1e-06 or more" in result.stdout
    assert len(list((tmp_path / "2" / ".progress").glob("start_00001.rank_0000?.jsonl"))) == 2
    for path in (tmp_path / "1").glob("train-*"):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name


def test_nothing_sure_enough_is_said_and_a_lower_threshold_asks_nobody_again(run, data, tmp_path):
    words = run, [str(data / "x-*.tar")], tmp_path / "out"
    with pytest.raises(ConfigError, match=r"no answer of 13 reaches --threshold 0.9999, the surest has 0\.\d+; lower it"):
        pseudo_label(*words, threshold=0.9999)
    assert not list((tmp_path / "out").glob("*.tar"))
    report = pseudo_label(*words, threshold=1e-6)
    assert report.num_kept == 10 and not (tmp_path / "out" / ".progress" / "start_00002.rank_00000.jsonl").exists()
    with pytest.raises(ConfigError, match="none of 0 samples was given a label"):
        pseudo_label(*words[:2], tmp_path / "other", tasks=["captioning"])


def test_settings_and_heads_that_label_nothing_are_refused(run, data, tmp_path):
    for threshold in (0.0, 1.2, float("nan")):
        with pytest.raises(ConfigError, match="is no probability"):
            pseudo_label(run, [str(data / "x-*.tar")], tmp_path / "out", threshold=threshold)
    write_run(tmp_path / "masked", head=Head("masked", states="vision"))
    with pytest.raises(ConfigError, match="a masked head, whose answers have no probability as a whole"):
        pseudo_label(tmp_path / "masked", [str(data / "x-*.tar")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_said_before_anything_is_asked(run, data, tmp_path):
    shards = [str(data / "x-*.tar")]
    with pytest.raises(DataError, match=r"x-00000\.tar, which hold the same samples; name them once"):
        pseudo_label(run, [*shards, str(data / "x-00000.tar")], tmp_path / "out")
    with pytest.raises(ConfigError, match="split 'Train' cannot begin a file's name"):
        pseudo_label(run, shards, tmp_path / "out", split="Train")
    assert not (tmp_path / "out").exists()
    shutil.copy(data / "x-00000.tar", tmp_path / "train-00000.tar")
    with pytest.raises(DataError, match=r"already holds train-00000\.tar; name another --output"):
        pseudo_label(run, shards, tmp_path)
    assert not (tmp_path / ".progress").exists()
    pseudo_label(run, shards, tmp_path / "mine", threshold=1e-6)
    before = (tmp_path / "mine" / "answers.jsonl").read_bytes()
    write_run(tmp_path / "other", head=Head("linear", LABELS))
    with pytest.raises(DataError, match='begun with settings "'):
        pseudo_label(tmp_path / "other", shards, tmp_path / "mine", threshold=1e-6)
    assert (tmp_path / "mine" / "answers.jsonl").read_bytes() == before


def test_samples_of_one_key_and_keys_of_other_letters_are_written_all(tmp_path):
    for number in range(2):
        samples = {key: as_files(unanswered([{"type": "text", "text": f"{key} {number}"}])) for key in ("same", f"own {number}")}
        write_index(write_tar(tmp_path / f"x-{number:05}.tar", samples))
    places = list_places({"x": str(tmp_path / "x-*.tar")})
    answers = [Labelled("x", place.tar.name, place.number, load_index(place.tar).key(place.number), "classification") for place in places]
    answers = [replace(one, label="yes", confidence=0.4 + 0.5 * (one.shard == "x-00000.tar")) for one in answers]
    originals, names = Originals.of(places), {}
    for threshold in (0.3, 0.8):
        source = labelled_source(answers, threshold, originals, labeller=Labeller(None, ""))
        prepare(source, Job(tmp_path / str(threshold)))
        names[threshold] = {key: sample.messages[0].content[0].text for key, sample in written(tmp_path / str(threshold)).items()}
    digests = [load_index(tmp_path / f"x-{number:05}.tar").digest[:16] for number in range(2)]
    assert {f"{digest}/same": f"same {number}" for number, digest in enumerate(digests)}.items() <= names[0.3].items()
    assert sorted(names[0.3].values()) == ["own 0 0", "own 1 1", "same 0", "same 1"] and names[0.8].items() < names[0.3].items()
    assert len(names[0.8]) == 2


def test_several_labels_are_as_likely_as_all_yeses_and_noes_together():
    labels = (LabelScore("joy", 0.9), LabelScore("fear", 0.8), LabelScore("anger", 0.1))
    assert _of_head(Reply("joy, fear", labels=labels), True) == ("joy, fear", pytest.approx(0.9 * 0.8 * 0.9), "")
    assert _of_head(Reply("", labels=labels[2:]), True)[0] == ""
    assert _of_head(Reply("joy", labels=labels), False) == ("joy", 0.9, "")


def test_weights_that_overflow_label_nothing(data, tmp_path):
    loaded = write_run(tmp_path / "run", head=Head("linear", LABELS, states="vision"))
    with torch.no_grad():
        loaded.model.head.kind.classify.weight.fill_(torch.nan)
    said = list(ask(loaded, read_samples(list_places({"x": str(data / "x-*.tar")}))))
    pictures = [one for one in said if one.key.startswith("p")]
    assert pictures and {(one.label, one.confidence, one.reason.partition(";")[0]) for one in pictures} == {
        ("", 0.0, "the model gives no finite score")
    }


def test_a_task_whose_answers_are_no_words_is_not_labelled(tmp_path):
    write_index(write_tar(tmp_path / "x-0.tar", {"a": as_files({**unanswered(ASK), "task": "detection"})}))
    (said,) = ask(random_model(tmp_path), read_samples(list_places({"x": str(tmp_path / "x-*.tar")})))
    assert said.reason == "answers of detection are boxes, and no labels"


def test_answers_in_tokens_are_as_likely_as_all_of_their_tokens_and_the_end(data, tmp_path):
    loaded = random_model(tmp_path)
    encoder = SampleEncoder(loaded.tokenizer, loaded.media)
    pictures = [sample for key, sample in originals(data).items() if key.startswith("p")]
    asked = [replace(sample, messages=sample.messages[:1]) for sample in pictures]
    learn(loaded.model, [encoder.encode("", with_label(sample, LABELS[n % 2]))[0] for n, sample in enumerate(asked[:4])])
    places = [place for place in list_places({"x": str(data / "x-*.tar")})]
    said = {one.key: one for one in ask(loaded, read_samples(places), batch_size=4, max_new_tokens=6)}
    assert len(said) == 13 and any(one.label for one in said.values())
    for sample in asked:
        one = said[sample.key]
        if not one.label:
            assert one.reason and one.confidence == 0
            continue
        sequence, _ = encoder.encode("", with_label(sample, one.label))
        assert one.confidence == pytest.approx(likelihood(loaded.model, sequence), rel=1e-3)


def learn(model, sequences) -> None:
    """Let a model of random weights say something short."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        sequence = sequences[step % len(sequences)]
        loss = model(**inputs_of(sequence), labels=torch.from_numpy(sequence.labels).long()[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def inputs_of(sequence) -> dict:
    picture = sequence.images[0]
    return {
        "input_ids": torch.from_numpy(sequence.input_ids).long()[None],
        "attention_mask": torch.ones(1, len(sequence.input_ids), dtype=torch.long),
        "pixel_values": torch.from_numpy(picture.pixels)[None],
        "pixel_attention_mask": torch.ones(1, len(picture.pixels), dtype=torch.long),
        "spatial_shapes": torch.tensor([picture.grid]),
        "use_cache": False,
    }


def likelihood(model, sequence) -> float:
    """From the whole table of logits, which the command never makes."""
    with torch.no_grad():
        logs = model(**inputs_of(sequence)).logits[0].float().log_softmax(-1)
    labels = sequence.labels
    return math.exp(sum(float(logs[place, labels[place]]) for place in (labels >= 0).nonzero()[0].tolist()))


def test_a_label_takes_the_place_of_the_answer_alone():
    document = chat(ASK, "two") | {"speaker": "ann", "confidence": 0.1}
    found = relabelled(document, "classification", "one", confidence=0.75, step=None)
    assert found["messages"] == [document["messages"][0], {"role": "assistant", "content": [{"type": "label", "text": "one"}]}]
    assert (found["speaker"], found["confidence"], found["labelled_at_step"]) == ("ann", 0.75, None)
    assert document["messages"][1]["content"][0]["text"] == "two"
    assert relabelled(unanswered(ASK), "captioning", "a dog", confidence=1.0, step=2)["messages"][1]["content"][0]["type"] == "text"


def test_a_sample_without_an_answer_teaches_no_token(tmp_path):
    loaded = random_model(tmp_path)
    sample = Sample("k", "classification", (Message("user", (Part("text", text="What digit is this?"),)),))
    with pytest.raises(BadSample, match="no assistant message, so nothing to learn in tokens"):
        SampleEncoder(loaded.tokenizer, loaded.media).encode("d", sample)
