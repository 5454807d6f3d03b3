import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from megamm.cli import main
from megamm.core.errors import ConfigError, DataError
from megamm.core.predictions import Box, Instance
from megamm.data.shards.index import write_index
from megamm.evaluation import evaluate, progress
from megamm.evaluation.held_out import list_places, read_samples
from megamm.evaluation.judge import judge
from megamm.evaluation.progress import FOLDER, alone
from megamm.evaluation.records import Answered, Scored, SkippedSample, result_from_json
from megamm.evaluation.report import make_report
from megamm.export import export
from megamm.tasks import TASKS
from megamm.tasks.reply import Reply
from tests.support.ranks import run_ranks
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar
from tests.support.tiny_run import random_model, write_run

ASK = {"type": "text", "text": "What digit is this?"}
IMAGE, AUDIO = {"type": "image", "member": "0.png"}, {"type": "audio", "member": "0.flac"}
DOCUMENTS = ["two is a number", "It is the number one; say one.", "say", "three 3"]
SETTINGS = {"batch_size": 3, "max_new_tokens": 5}
CHANGES = ("blur", "gain")


def picture(seed):
    return jpeg(20 + seed, 30, seed=seed, format="PNG")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Seven pictures in two shards, one damaged inside; three sounds, one of them empty; four texts, one too long."""
    root = tmp_path_factory.mktemp("held_out")
    pictures = {
        f"p{number}": as_files(chat([IMAGE, ASK], ["zero", "one", "two"][number % 3]), _0_png=picture(number)) for number in range(7)
    }
    pictures["p3"] = as_files(chat([IMAGE, ASK], "zero"), _0_png=picture(3)[:200])
    keys = list(pictures)
    write_index(write_tar(root / "pictures-0.tar", {key: pictures[key] for key in keys[:4]}))
    write_index(write_tar(root / "pictures-1.tar", {key: pictures[key] for key in keys[4:]}))
    sounds = {
        f"s{number}": as_files(chat([AUDIO], "Say  ONE", task="speech_recognition"), _0_flac=flac(9000, seed=number)) for number in range(2)
    }
    sounds["s2"] = as_files(chat([AUDIO], "one", task="speech_recognition"), _0_flac=b"nothing")
    write_index(write_tar(root / "sounds-0.tar", sounds))
    texts = {f"t{number}": as_files(text_document(text)) for number, text in enumerate(DOCUMENTS)}
    texts["t9"] = as_files(text_document("say one two three four " * 2100))
    write_index(write_tar(root / "texts-0.tar", texts))
    return root


@pytest.fixture(scope="module")
def datasets(root):
    return {name: str(root / f"{name}-*.tar") for name in ("pictures", "sounds", "texts")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("evaluate") / "run"
    write_run(run)
    return run


@pytest.fixture(scope="module")
def report(run, datasets):
    return evaluate(run, datasets=datasets, output=run / "evaluation", **SETTINGS)


def test_every_sample_counts_once_or_is_skipped_with_a_reason(report):
    counted = Counter((record.dataset, record.key) for record in report.records)
    skipped = {(one.dataset, one.key): one.reason for one in report.skipped}
    assert len(skipped) == len(report.skipped)
    everything = [("pictures", f"p{number}") for number in range(7)] + [("sounds", f"s{number}") for number in range(3)]
    everything += [("texts", f"t{number}") for number in (0, 1, 2, 3, 9)]
    assert counted + Counter(list(skipped)) == Counter(everything)
    assert set(skipped) == {("pictures", "p3"), ("sounds", "s2"), ("texts", "t9")}
    assert "positions" in skipped["texts", "t9"]
    assert all(skipped.values())


def test_rows_say_dataset_task_samples_metric_and_chance(report):
    rows = {(row.dataset, row.task, row.metric): row for row in report.rows}
    accuracy = rows["pictures", "classification", "accuracy"]
    assert accuracy.samples == 6
    assert accuracy.chance == 2 / 6
    assert rows["sounds", "speech_recognition", "accuracy"].samples == 2
    assert rows["sounds", "speech_recognition", "accuracy"].chance == 1.0
    assert rows["pictures", "classification", "macro_recall"].chance == pytest.approx(1 / 3)
    assert accuracy.low is not None and accuracy.low <= accuracy.value <= accuracy.high
    assert {metric for dataset, _, metric in rows if dataset == "texts"} == {"perplexity", "bits_per_byte"}


def test_answers_do_not_depend_on_the_batches(run, datasets, report):
    alone = evaluate(run, datasets=datasets, **{**SETTINGS, "batch_size": 1})
    assert [record.key for record in alone.records] == [record.key for record in report.records]
    for one, other in zip(alone.records, report.records, strict=True):
        if one.dataset == "texts":
            assert one.nats == pytest.approx(other.nats, rel=1e-5)
        else:
            assert one.answer.probability == pytest.approx(other.answer.probability, rel=1e-4)
            assert dataclasses.replace(one, answer=other.answer) == other
            assert dataclasses.replace(one.answer, probability=other.answer.probability) == other.answer


def test_perplexity_is_that_of_each_document_alone(run, report):
    loaded = random_model(run)
    nats, labels = 0.0, []
    eos = loaded.tokenizer.vocabulary.control_id("eos")
    for text in DOCUMENTS:
        ids = [loaded.tokenizer.vocabulary.control_id("bos"), *loaded.tokenizer.encode(text), eos]
        with torch.no_grad():
            likelihoods = loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        nats -= float(likelihoods[range(len(ids) - 1), ids[1:]].double().sum())
        labels += ids[1:]
    values = {row.metric: row for row in report.rows if row.dataset == "texts"}
    assert values["perplexity"].value == pytest.approx(math.exp(nats / len(labels)), rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    assert values["bits_per_byte"].value == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    entropy = -sum(count / len(labels) * math.log(count / len(labels)) for count in Counter(labels).values())
    assert values["perplexity"].chance == pytest.approx(math.exp(entropy))


def test_figures_are_those_of_the_answers():
    pairs = {"p0": ("zero", " zero\n"), "p1": ("one", "one"), "p2": ("two", "two"), "p3": ("two", "unheard of"), "p4": ("zero", "one")}
    records = [
        answered("digits", number, key, reference, answer, is_finished=answer != "unheard of", voice="ab"[number % 2])
        for number, (key, (reference, answer)) in enumerate(pairs.items())
    ]
    report = make_report(records[::-1], [], source="here", step=1, settings={}, slices=["voice", "unknown"])
    figures = [(row.slice, row.samples, row.metric, row.value) for row in report.rows if row.metric != "macro_f1"]
    assert figures == [
        ("", 5, "accuracy", 3 / 5),
        ("", 5, "macro_recall", pytest.approx((1 + 1 / 2 + 1 / 2) / 3)),
        ("voice=a", 3, "accuracy", 2 / 3),
        ("voice=a", 3, "macro_recall", pytest.approx((1 / 2 + 1) / 2)),
        ("voice=b", 2, "accuracy", 1 / 2),
        ("voice=b", 2, "macro_recall", pytest.approx((1 + 0) / 2)),
    ]
    assert [row.chance for row in report.rows[:2]] == [2 / 5, pytest.approx(1 / 3)]
    assert {row.chance for row in report.rows if row.slice} == {None}
    confusion = report.confusions["digits/classification"]
    assert (confusion.classes, confusion.answers) == (("one", "two", "zero"), ("one", "two", "zero", "unheard of"))
    assert confusion.counts == ((1, 0, 0, 0), (0, 1, 0, 1), (1, 0, 1, 0))
    assert [(one.label, one.recall) for one in report.classes["digits/classification"]] == [("one", 1), ("two", 0.5), ("zero", 0.5)]
    assert report.unfinished == {"digits/classification": 1}
    assert [record.key for record in report.records] == list(pairs)


def answered(dataset, number, key, reference, answer, *, task="classification", is_finished=True, **metadata):
    names = {"dataset": dataset, "task": task, "shard": "a.tar", "number": number, "key": key, "metadata": metadata}
    return Answered(**names, reference=Reply(reference), answer=Reply(answer, is_finished=is_finished))


def scored(nats):
    names = {"dataset": "texts", "task": "text", "shard": "a.tar", "number": 0, "key": "t0"}
    return Scored(**names, nats=nats, num_tokens=2, num_bytes=3, token_counts={1: 2})


def test_a_figure_that_is_not_a_number_is_shown_as_none(tmp_path):
    report = make_report([scored(math.nan)], [], source="here", step=None, settings={})
    assert [row.value for row in report.rows] == [None, None]
    report.write(tmp_path)
    assert "| perplexity | – |  | 1 |" in (tmp_path / "report.md").read_text()
    huge = make_report([scored(1e6)], [], source="here", step=None, settings={})
    assert huge.rows[0].value is None


def test_results_come_back_from_their_lines():
    box = Box("RBC", (1.0, 2.0, 3.5, 4.0), 0.25)
    instance = Instance("nucleus", (2, 3), (1, 2, 3), 0.5)
    reply = Reply("seven", (box,), (instance,), num_malformed=2, is_finished=False)
    found = answered("digits", 3, "p3", "zero", "one", voice="a")
    for result in (
        found,
        dataclasses.replace(found, answer=reply),
        scored(1.5),
        SkippedSample(dataset="d", shard="s", number=1, key="k", reason="r"),
    ):
        assert result_from_json(json.loads(json.dumps(result.to_json()))) == result
    assert math.isnan(result_from_json(json.loads(json.dumps(scored(math.nan).to_json()))).nats)


def test_an_exported_folder_and_a_checkpoint_are_judged_as_their_run(run, datasets, report, tmp_path):
    exported = export(run, tmp_path / "exported", dtype="float32", parity=False)
    for source, step in ((exported, None), (run / "checkpoints" / "step_00000003", 3)):
        other = evaluate(source, datasets=datasets, **SETTINGS)
        assert (other.step, other.skipped, other.confusions) == (step, report.skipped, report.confusions)
        names = ("dataset", "task", "slice", "samples", "metric", "chance")
        assert [[getattr(row, name) for name in names] for row in other.rows] == [
            [getattr(row, name) for name in names] for row in report.rows
        ]
        for name in ("value", "low", "high"):
            assert [getattr(row, name) for row in other.rows] == pytest.approx([getattr(row, name) for row in report.rows], rel=1e-5)


def test_the_report_on_a_checkpoint_lies_in_its_run(run, datasets, capsys):
    checkpoint = run / "checkpoints" / "step_00000003"
    before = sorted(checkpoint.iterdir())
    words = ("--shards", f"texts={datasets['texts']}", "--tasks", "text")
    assert main(["evaluate", str(checkpoint), *words]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert json.loads((run / "evaluation_step_00000003" / "report.json").read_text())["source"] == str(checkpoint)
    assert sorted(checkpoint.iterdir()) == before


def test_the_report_is_written_whole(run, report):
    folder = run / "evaluation"
    pictures = {f"{kind}-pictures-classification.png" for kind in ("samples", "confusion", "precision")}
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "predictions.jsonl", *pictures}
    table = json.loads((folder / "report.json").read_text())
    assert table["step"] == 3
    assert len(table["rows"]) == len(report.rows)
    assert sum(map(sum, table["confusions"]["pictures/classification"]["counts"])) == 6
    assert {one["key"] for one in table["skipped"]} == {"p3", "s2", "t9"}
    assert table["settings"]["max_new_tokens"] == 5
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [one["key"] for one in predictions] == [record.key for record in report.records]
    text = (folder / "report.md").read_text()
    assert text == report.to_markdown()
    assert "| pictures | classification |  | 6 | accuracy |" in text
    assert "p3" in text


def test_parts_of_the_samples_add_up_to_the_whole(run, datasets, report):
    """What ranks will do: judge disjoint parts."""
    loaded = random_model(run)
    places = list_places(datasets)
    results = []
    for rank in range(3):
        samples = read_samples(places[rank::3])
        results += judge(loaded, samples, tasks=TASKS, batch_size=2, max_new_tokens=5)
    keys = Counter(result.key for result in results)
    assert keys == Counter([record.key for record in report.records] + [one.key for one in report.skipped])
    assert sum(isinstance(result, SkippedSample) for result in results) == len(report.skipped)


def judge_places(run, datasets, output, max_judged, **settings):
    """An evaluation that is killed after so many samples."""
    done = []

    def judged(self, result):
        if len(done) == max_judged:
            raise KeyboardInterrupt
        done.append(result.key)
        write(self, result)

    write = progress.Progress.write
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress.Progress, "write", judged)
        evaluate(run, datasets=datasets, output=output, **SETTINGS, **settings)
    return done


def test_a_killed_evaluation_goes_on_where_it_stopped(run, datasets, report, tmp_path, caplog):
    done = judge_places(run, datasets, tmp_path, 4) + judge_places(run, datasets, tmp_path, 3)
    assert len(done) == len(set(done)) == 7
    # Cut in the middle of a line, as by a kill.
    newest = sorted((tmp_path / FOLDER).glob("*.jsonl"))[-1]
    newest.write_bytes(newest.read_bytes()[:-5])
    whole = evaluate(run, datasets=datasets, output=tmp_path, **SETTINGS)
    assert "6 of 15 samples were evaluated before" in caplog.text
    assert [record.key for record in whole.records] == [record.key for record in report.records]
    assert [row.value for row in whole.rows] == pytest.approx([row.value for row in report.rows], rel=1e-5)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_part_of_another_evaluation_is_not_taken_over(run, datasets, tmp_path, caplog):
    judge_places(run, datasets, tmp_path, 4)
    again = evaluate(run, datasets={"texts": datasets["texts"]}, output=tmp_path, **SETTINGS)
    assert "a part of another evaluation, which begins anew" in caplog.text
    assert len(again.records) == 4


def test_two_evaluations_do_not_share_a_folder(run, datasets, tmp_path):
    with alone(tmp_path), pytest.raises(DataError, match=r"another evaluation writes into .* at this moment"):
        evaluate(run, datasets={"texts": datasets["texts"]}, output=tmp_path, **SETTINGS)
    assert evaluate(run, datasets={"texts": datasets["texts"]}, output=tmp_path, **SETTINGS) is not None


@pytest.fixture(scope="module")
def changed_report(run, datasets, tmp_path_factory):
    """Killed while pictures are blurred, and gone on with."""
    output = tmp_path_factory.mktemp("changed")
    done = judge_places(run, datasets, output, 20, changes=CHANGES)
    assert done.count("p0") == 2
    return evaluate(run, datasets=datasets, output=output, changes=CHANGES, **SETTINGS), output


def test_changed_media_are_compared_with_clean_ones(changed_report, report):
    changed, output = changed_report
    assert [row.value for row in changed.rows] == pytest.approx([row.value for row in report.rows], rel=1e-5)
    assert [record.key for record in changed.records] == [record.key for record in report.records]
    cells = [(row.dataset, row.change, row.strength, row.samples) for row in changed.robustness]
    assert cells == [("pictures", "image_blur", one, 6) for one in (0.01, 0.02, 0.04)] + [
        ("sounds", "audio_gain", one, 2) for one in (-20, -10, 10)
    ]
    clean = {(row.dataset, row.metric): row.value for row in report.rows}
    for row in changed.robustness:
        assert row.clean == clean[row.dataset, row.metric] and row.difference == pytest.approx(row.value - row.clean)
    assert {path.name for path in output.iterdir() if path.name.startswith("robustness")} == {
        "robustness-pictures-classification.png",
        "robustness-sounds-speech_recognition.png",
    }
    assert "| pictures | classification | image_blur | 0.04 | 6 | accuracy |" in (output / "report.md").read_text()


@pytest.mark.distributed
def test_ranks_share_the_samples_and_one_report(run, datasets, report, changed_report, tmp_path):
    judge_places(run, datasets, tmp_path, 4, changes=CHANGES)
    found, none = run_ranks(evaluate_on_rank, 2, str(run), datasets, str(tmp_path))
    assert none is None and found[0] == pytest.approx([row.value for row in report.rows], rel=1e-5)
    assert found[1] == pytest.approx([row.value for row in changed_report[0].robustness], rel=1e-5)
    table = json.loads((tmp_path / "report.json").read_text())
    assert table["settings"]["num_ranks"] == 2
    predictions = [json.loads(line)["key"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert predictions == [record.key for record in report.records]


def evaluate_on_rank(run, datasets, output):
    report = evaluate(Path(run), datasets=datasets, output=Path(output), changes=CHANGES, **SETTINGS)
    return None if report is None else ([row.value for row in report.rows], [row.value for row in report.robustness])


def test_a_bound_on_samples_spreads_over_the_dataset(datasets):
    places = list_places(datasets, max_samples=2)
    assert [(place.dataset, place.tar.name, place.number) for place in places] == [
        ("pictures", "pictures-0.tar", 0),
        ("pictures", "pictures-0.tar", 3),
        ("sounds", "sounds-0.tar", 0),
        ("sounds", "sounds-0.tar", 1),
        ("texts", "texts-0.tar", 0),
        ("texts", "texts-0.tar", 2),
    ]
    assert list_places(datasets, max_samples=100) == list_places(datasets)


def test_only_the_tasks_that_are_asked_for_count(run, datasets):
    report = evaluate(run, datasets=datasets, tasks=["text"], **SETTINGS)
    assert {row.task for row in report.rows} == {"text"}
    assert not report.confusions
    with pytest.raises(ConfigError, match="none of 3 held-out samples could be evaluated"):
        evaluate(run, datasets={"sounds": datasets["sounds"]}, tasks=["text"], **SETTINGS)


def test_what_cannot_be_evaluated_is_named(run, datasets, root):
    with pytest.raises(ConfigError, match="task 'guessing' is not known; the tasks are classification"):
        evaluate(run, datasets=datasets, tasks=["guessing"])
    with pytest.raises(ConfigError, match="batch_size=0 evaluates nothing"):
        evaluate(run, datasets=datasets, batch_size=0)
    with pytest.raises(DataError, match="dataset gone: no shard matches"):
        evaluate(run, datasets={"gone": str(root / "gone-*.tar")})
    with pytest.raises(ConfigError, match=r"has no data\.held_out"):
        evaluate(run)
    write_tar(root / "bare.tar", {"a": as_files(text_document("say"))})
    with pytest.raises(DataError, match="index is missing"):
        evaluate(run, datasets={"bare": str(root / "bare.tar")})


def test_a_shard_that_changed_ends_the_evaluation(run, tmp_path):
    tar = write_tar(tmp_path / "texts.tar", {"a": as_files(text_document("say"))})
    write_index(tar)
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(DataError, match="changed since it was indexed"):
        evaluate(run, datasets={"texts": str(tar)}, **SETTINGS)


def test_a_shard_that_is_gone_is_noticed(tmp_path):
    for number in range(2):
        write_index(write_tar(tmp_path / f"texts-{number}.tar", {"a": as_files(text_document("say"))}))
    (tmp_path / "texts-1.tar").unlink()
    with pytest.raises(DataError, match=r"texts-1\.tar does not exist, but its index does"):
        list_places({"texts": str(tmp_path / "texts-*.tar")})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", '{"figures": [1, 2]}', r"holds a report\.json that is no evaluation's"),
        ("report.json", "not JSON", r"holds a report\.json that is no evaluation's"),
        ("notes.txt", "mine", r"holds notes\.txt, which is no part of a report"),
    ],
)
def test_files_of_others_are_not_overwritten(run, datasets, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        evaluate(run, datasets={"texts": datasets["texts"]}, output=tmp_path, **SETTINGS)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_an_earlier_report_is_replaced(run, datasets, tmp_path):
    for max_samples in (1, 2):
        evaluate(run, datasets={"texts": datasets["texts"]}, output=tmp_path, max_samples=max_samples, **SETTINGS)
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["max_samples"] == 2
    with pytest.raises(ConfigError, match="is a file"):
        evaluate(run, datasets=datasets, output=tmp_path / "report.md")


def test_samples_of_unknown_tasks_are_skipped_with_the_reason(run, tmp_path):
    ask = [{"type": "text", "text": "say one"}]
    samples = {"a": as_files(text_document("say")), "b": as_files(chat(ask, "one", task="guessing"))}
    write_index(write_tar(tmp_path / "mixed.tar", samples))
    datasets = {"mixed": str(tmp_path / "mixed.tar")}
    report = evaluate(run, datasets=datasets, **SETTINGS)
    assert [record.key for record in report.records] == ["a"]
    (entry,) = report.skipped
    assert entry.key == "b" and entry.reason.startswith("task 'guessing' is not known; the tasks are ")
    assert not evaluate(run, datasets=datasets, tasks=["text"], **SETTINGS).skipped


def test_shards_of_one_name_in_two_folders_are_refused_instead_of_mixed_up(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_index(write_tar(tmp_path / name / "test-00000.tar", {name: as_files(text_document(name))}))
    with pytest.raises(DataError, match=r"first/test-00000.tar and .*second/test-00000.tar of both have one file name"):
        list_places({"both": str(tmp_path / "*" / "test-*.tar")})
    assert len(list_places({name: str(tmp_path / name / "test-*.tar") for name in ("first", "second")})) == 2


def test_an_exported_folder_with_other_weights_is_another_model(tmp_path):
    loaded = random_model(tmp_path / "made")
    (tmp_path / "config.json").write_text("{}")
    found = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(content)
        found.append(progress.contents_of(dataclasses.replace(loaded, source=tmp_path, step=None)))
    assert found[0] == found[2] != found[1]


def test_tasks_and_slices_that_match_nothing_are_named(run, datasets):
    asked = {"tasks": ["text", "detection"], "slices": ["voice", "label"], "changes": ["blur"]}
    report = evaluate(run, datasets={"texts": datasets["texts"]}, **asked, **SETTINGS)
    assert report.unmatched == (
        "no sample of task 'detection' could be evaluated; the tasks of the samples are text",
        "no sample has the metadata field 'voice' of slices; the fields are none",
        "no sample has the metadata field 'label' of slices; the fields are none",
        "change 'image_blur' found no image in a sample that has figures",
    )
    assert all(words in report.to_markdown() for words in report.unmatched)


def test_one_feeling_a_sample_has_a_confusion_matrix_and_several_have_none():
    single = [
        answered("faces", number, f"f{number}", *pair, task="sentiment")
        for number, pair in enumerate([("joy", "joy"), ("fear", "joy, fear")])
    ]
    report = make_report(single, [], source="here", step=1, settings={})
    confusion = report.confusions["faces/sentiment"]
    assert (confusion.classes, confusion.counts) == (("fear", "joy"), ((0, 0, 1), (0, 1, 0)))
    several = [*single, answered("faces", 2, "f2", "joy, fear", "joy", task="sentiment")]
    assert not make_report(several, [], source="here", step=1, settings={}).confusions


def test_slices_are_labels_values_or_quarters_of_measurements():
    records = [
        answered("digits", number, f"d{number}", "ab"[number % 2], "a", loudness=number / 7, voice=number % 3) for number in range(40)
    ]
    report = make_report(records, [], source="here", step=1, settings={}, slices=["label", "loudness", "voice"])
    found = {row.slice: (row.samples, row.value) for row in report.rows if row.metric == "accuracy"}
    assert found["label=a"] == (20, 1) and found["label=b"] == (20, 0)
    assert [name for name in found if name.startswith("voice")] == ["voice=0", "voice=1", "voice=2"]
    assert sorted(size for name, (size, _) in found.items() if name.startswith("loudness")) == [10, 10, 10, 10]
    assert "loudness=0 to 1.393" in found


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ([1.7e9 + number for number in range(40)], [10, 10, 10, 10]),
        ([*(number / 7 for number in range(40)), "unknown", "unknown"], [2, 10, 10, 10, 10]),
        ([*(number / 7 for number in range(40)), math.nan], [1, 10, 10, 10, 10]),
        ([*([0.5] * 60), *(number / 7 for number in range(10, 30))], [20, 60]),
    ],
    ids=["alike in four digits", "beside words", "one is none", "most are the same"],
)
def test_each_measurement_is_in_one_slice(values, sizes):
    records = [answered("digits", number, f"d{number}", "a", "a", at=value) for number, value in enumerate(values)]
    report = make_report(records, [], source="here", step=1, settings={}, slices=["at"])
    assert sorted(row.samples for row in report.rows if row.metric == "accuracy" and row.slice) == sizes
