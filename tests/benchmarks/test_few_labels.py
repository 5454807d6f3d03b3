"""The short form of the benchmark of few labels, on a small set in the place of the real one: every way is walked, by the real commands."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import few_labels
from benchmarks.few_labels import MEDIA, QUICK, WAYS, Experiment, answer_of, medium_rows, prepare_set, write_few
from benchmarks.reference.emotions import GROUPS
from megamm.core.files import write_json
from megamm.data.samples.mapping import OWN_FORM, read_sample
from megamm.data.shards.index import load_index, write_index
from megamm.data.shards.reader import LocalReader, ShardReader
from tests.support.shards import as_files, chat, jpeg, write_tar

ASK = [{"type": "image", "member": "0.png"}, {"type": "text", "text": "Which digit is this?"}]


def write_set(folder: Path, num_train: int, num_test: int) -> None:
    for split, num in (("train", num_train), ("test", num_test)):
        samples = {
            f"{split}-{number}": as_files(chat(ASK, str(number % 10)), _0_png=jpeg(28, 28, seed=number, format="PNG"))
            for number in range(num)
        }
        write_index(write_tar(folder / f"{split}-00000.tar", samples))
    write_json(folder / "train-report.json", {})


def read(tar: Path) -> dict[str, str]:
    reader = LocalReader()
    shard = ShardReader(tar, load_index(tar), reader)
    found = {shard.index.key(number): answer_of(read_sample(shard, number, OWN_FORM)) for number in range(shard.index.num_samples)}
    reader.close()
    return found


def test_ten_of_each_class_are_drawn_the_same_way_again_and_others_by_another_seed(tmp_path):
    write_set(tmp_path, 150, 1)
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_few([tmp_path / "train-00000.tar"], tmp_path / f"{name}.tar", tmp_path / f"rest-{name}.tar", seed)
        found.append(read(tmp_path / f"{name}.tar"))
    assert found[0] == found[1] and found[0].keys() != found[2].keys()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert Counter(found[2].values()) == {str(digit): 10 for digit in range(10)}
    # What is labelled is not among what is not.
    everything, rest = read(tmp_path / "train-00000.tar"), read(tmp_path / "rest-c.tar")
    assert not rest.keys() & found[2].keys() and {**rest, **found[2]} == everything


@pytest.mark.parametrize("medium", MEDIA, ids=lambda medium: medium.name)
def test_ways_differ_in_how_they_spend_the_same_steps(monkeypatch, tmp_path, medium):
    """Of each run the steps, which add up along the way that leads to it."""
    steps, sources = {}, {}

    def note(self, run, num_steps, datasets, *, head, source=""):
        steps[run], sources[run] = num_steps, source
        return run

    monkeypatch.setattr(Experiment, "train", note)
    monkeypatch.setattr(few_labels, "pseudo_label", lambda *_, **__: None)
    monkeypatch.setattr(few_labels, "write_few", lambda *_: None)
    experiment = Experiment(medium, tmp_path, few_labels.FULL)
    for way in WAYS:
        run, given = experiment.way(way, 0)
        teacher = steps[f"{run}-teacher"] if given is not None else 0
        assert steps[run] + teacher + (steps["hidden"] if sources[run] else 0) == few_labels.FULL.all
        assert sources[run] == ("hidden" if way in ("self-supervised start", "both") else "")


def test_a_quick_run_leaves_results_alone(tmp_path):
    assert few_labels.work_folder(tmp_path, quick=False) == tmp_path
    assert few_labels.work_folder(tmp_path, quick=True) == tmp_path / "quick"


def test_a_run_that_was_stopped_is_no_result(monkeypatch, tmp_path):
    monkeypatch.setattr(few_labels.subprocess, "run", lambda words, **_: few_labels.subprocess.CompletedProcess(words, 0))
    with pytest.raises(SystemExit, match="labels-alone-0 was stopped before its end"):
        Experiment(MEDIA[0], tmp_path, QUICK).train("labels-alone-0", 8, [], head=None)


def write_comments(data: Path) -> None:
    """As goemotions lies in the shared data: four groups, of each enough to draw ten; one comment shows two groups."""
    emotions = {"joy": "so happy and glad", "anger": "so angry and mad", "surprise": "oh what is that", "neutral": "the bus leaves at nine"}
    (data / "goemotions").mkdir(parents=True)
    (data / "goemotions" / "labels.txt").write_text("\n".join(emotions))
    for name, num in (("train", 48), ("dev", 4), ("test", 12)):
        lines = [f"{words} {name} {number}\t{id_}" for number in range(num // 4) for id_, words in enumerate(emotions.values())]
        lines.append(f"both at once {name}\t0,1")
        (data / "goemotions" / f"{name}.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_comments_are_learned_token_by_token_before_their_labels(monkeypatch, tmp_path):
    write_comments(tmp_path / "data")
    monkeypatch.setenv("MEGAMM_DATA", str(tmp_path / "data"))
    texts = replace(MEDIA[2], recipe=MEDIA[2].recipe.replace("text_size = 3000", "text_size = 300"))
    experiment = Experiment(texts, prepare_set(texts, tmp_path / "work"), replace(QUICK, num_test=0))
    assert Counter(read(experiment.folder / "test-00000.tar").values()) == dict.fromkeys(GROUPS, 3), "of one group each"
    rows = {row.row: row for row in medium_rows(experiment, [0])}
    assert all(0 <= rows[f"texts: {way}"].value <= 1 and "most frequent class 0.250" in rows[f"texts: {way}"].peer for way in WAYS)
    start = json.loads((experiment.folder / "runs" / "hidden" / "config.json").read_text())
    assert start["model"]["head"] is None and list(start["data"]["train"]) == ["all"]


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_every_way_is_trained_and_has_its_rows(tmp_path):
    write_set(tmp_path / "mnist12k", 120, QUICK.num_test)
    rows = {row.row: row for row in few_labels.measure(tmp_path, quick=True, num_seeds=1)}
    assert [f"pictures: {way}" in rows for way in WAYS] == [True] * 4
    assert all(0 <= rows[f"pictures: {way}"].value <= 1 for way in WAYS)
    assert [name for name in rows if name.endswith(" - labels alone")] == [f"pictures: {way} - labels alone" for way in WAYS[1:]]
    assert rows["pictures: both, kept, draw 0"].value == 1.0, "the short form keeps every label"
    # What is there is not made again, and says the same.
    experiment = Experiment(MEDIA[0], tmp_path / "mnist12k", QUICK)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mnist12k" / "runs").glob("*/DONE")}
    assert {row.row: row.value for row in medium_rows(experiment, [0])} == {name: row.value for name, row in rows.items()}
    assert len(before) == 7 and before == {path: path.stat().st_mtime_ns for path in before}
    right = np.array([experiment.correct(run).mean() for run in ("labels-alone-0", "both-0")])
    assert right.tolist() == pytest.approx([rows["pictures: labels alone"].value, rows["pictures: both"].value])
