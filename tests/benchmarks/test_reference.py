"""The reference run: the whole way on a share of the real data, and what its table is made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import results
from benchmarks.reference import shares, table
from benchmarks.reference import work as work_module
from benchmarks.reference.__main__ import main
from benchmarks.reference.emotions import GROUPS, grouped, grouped_macro_f1
from benchmarks.reference.made_of import check_run, newest_manifest
from benchmarks.reference.parts import ONE_TASK, Setting, longest_answer, only, room, tables, token_shares, toml
from benchmarks.reference.shop import Customer, Shop, baselines, figures
from benchmarks.reference.work import Work
from benchmarks.results import Row
from megamm.checkpoint.manifest import MANIFEST, step_folder
from megamm.config import Data, Dataset, load_recipe, to_dict
from megamm.config.schema import WeightChange
from megamm.core.errors import ConfigError, DataError, MegaMMError
from megamm.core.files import digest_file, write_json
from megamm.data.shards.index import write_index
from megamm.tokenizers.text import TextTokenizer
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar

DATA = os.environ.get("MEGAMM_DATA", "")
needs_data = pytest.mark.skipif(not DATA, reason="MEGAMM_DATA is not set, so there is no real data to train on")
SPLITS = (("train", "train"), ("held_out", "test"))
SETS = ("mnist12k", "fsdd", "bccd_320", "nuclei256", "goemotions", "online_retail", "tiny_shakespeare")


def small_recipe(path: Path, sets: tuple[str, ...] = SETS) -> Path:
    """The quick start's model on some sets of the real data."""
    recipe = (Path(__file__).parents[2] / "megamm" / "recipes" / "tiny.toml").read_text(encoding="utf-8")
    before, _, rest = recipe.partition("[data.train.digits]")
    after = rest[rest.index("[data]\n") :]
    datasets = (f'[data.{part}.{name}]\nshards = "{name}/{split}-*.tar"\n' for name in sets for part, split in SPLITS)
    text = "\n".join([before, *datasets, after])
    changes = {"row_tokens = 192": "row_tokens = 1536", "row_frames = 1600": "row_frames = 3000", "item_codes = 32": "item_codes = 64"}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


def customer(name: str, *baskets: list[int]) -> Customer:
    *before, last = baskets
    return Customer(name, tuple(np.array(basket) for basket in before), frozenset(last))


SHOP = Shop(tuple("abcdef"), (customer("1", [0, 1], [0, 2], [2, 3]), customer("2", [0], [0]), customer("3", [1], [0], [4, 5])))


def test_asked_are_customers_whose_last_basket_holds_something_new():
    assert [one.name for one in SHOP.asked] == ["1", "3"]
    assert [one.wanted for one in SHOP.asked] == [{3}, {4, 5}]
    assert SHOP.popularity.tolist() == [4, 2, 1, 0, 0, 0]


def test_items_meet_in_a_basket_and_as_new_ones_in_the_next():
    # a and b share a basket once, and a follows b once; b is in 2 baskets and left once more than that for a next one, a was new once.
    met = SHOP.co_occurrence
    assert met[0, 1] == pytest.approx(1 / (5 + 2 - 1))
    assert met[1, 0] == pytest.approx(2 / (4 + 5 - 2))
    assert met[1, 2] == pytest.approx(1 / (4 + 2 - 1))
    assert not met.diagonal().any()


def test_rankings_hold_nothing_that_a_customer_had():
    ranked = SHOP.ranked(lambda one: np.arange(6.0), SHOP.asked)
    assert [row[: 6 - len(one.had)] for row, one in zip(ranked, SHOP.asked, strict=True)] == [[5, 4, 3], [5, 4, 3, 2]]


def test_recall_is_over_what_ten_places_can_hold():
    many = customer("4", [0], list(range(1, 21)))
    assert figures([list(range(1, 11))], [many])["recall"] == 1
    assert figures([[*range(1, 6), *range(30, 35)]], [many]) == pytest.approx({"recall": 0.5, "hit_rate": 1.0, "ndcg": 0.6489}, abs=1e-4)


@needs_data
@pytest.mark.integration
def test_baselines_are_those_of_the_datas_readme():
    found = baselines(Shop.read(Path(DATA) / "online_retail"))
    assert found["popularity"]["recall"] == pytest.approx(0.034, abs=5e-4)
    assert found["co-occurrence"] == pytest.approx({"recall": 0.081, "hit_rate": 0.336, "ndcg": 0.075}, abs=5e-4)


def test_every_emotion_has_one_group():
    emotions = [emotion for group in GROUPS.values() for emotion in group.split()]
    assert len(emotions) == len(set(emotions)) == 28
    assert grouped("joy, anger,surprise, no emotion") == {"positive", "negative", "ambiguous"}
    answers, references = ["joy", "anger", "fear", "neutral"], ["love, joy", "anger", "surprise", "neutral"]
    assert grouped_macro_f1(answers, references) == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)


@needs_data
def test_the_datas_emotions_are_those():
    assert sorted((Path(DATA) / "goemotions" / "labels.txt").read_text().split()) == sorted(" ".join(GROUPS.values()).split())


def test_tables_of_a_recipe_are_replaced_by_words():
    value = {"a b": {"x": 1.5, "y": None, "on": True, "list": ["ü", '"']}}
    assert toml(value) == '{"a b" = {"x" = 1.5, "on" = true, "list" = ["ü", "\\""]}}'
    words = tables({"data.train": {"one": {"shards": "one-*.tar", "augment": {"audio_speeds": [0.9, 1.0]}}}, "train.steps": 7})
    recipe = load_recipe("tiny", words)
    assert list(recipe.data.train) == ["one"] and recipe.data.train["one"].augment.audio_speeds == (0.9, 1.0)
    assert recipe.train.steps == 7


def test_a_left_out_speaker_or_fold_is_not_trained_on():
    for name in ("reference_speaker", "reference_sounds"):
        recipe = load_recipe(name)
        held_out = {dataset.shards for dataset in recipe.data.held_out.values()}
        assert len(held_out) == 1 and not held_out & {dataset.shards for dataset in recipe.data.train.values()}
        assert len({(dataset.weight, dataset.augment) for dataset in recipe.data.train.values()}) == 1


@pytest.mark.parametrize(("row", "kept"), [({"split": "train"}, 24), ({}, 96)])
def test_a_quick_run_thins_tables(tmp_path, row, kept):
    table_file = tmp_path / "rows.jsonl"
    table_file.write_text("".join(json.dumps({**row, "number": number}) + "\n" for number in range(960)))
    shares.thin(table_file)
    numbers = [json.loads(line)["number"] for line in table_file.read_text().splitlines()]
    assert len(numbers) == kept and np.diff(numbers).tolist() == [960 // kept] * (kept - 1)


def test_a_quick_run_thins_pictures_texts_and_shops(tmp_path):
    annotations = {"images": [{"id": number} for number in range(48)], "annotations": [{"image_id": number} for number in range(48)]}
    (tmp_path / "a.json").write_text(json.dumps(annotations))
    shares.thin(tmp_path / "a.json")
    thinned = json.loads((tmp_path / "a.json").read_text())
    assert [one["id"] for one in thinned["images"]] == [one["image_id"] for one in thinned["annotations"]] == list(range(0, 48, 2))
    events = [f"u{user}\ti{user * 2 + item}\t1\t1\n" for user in range(48) for item in range(2)]
    (tmp_path / "events.tsv").write_text("user\titem\ttime\tbasket\n" + "".join(events))
    (tmp_path / "items.tsv").write_text("item\ttext\n" + "".join(f"i{item}\tx\n" for item in range(96)))
    shares.thin(tmp_path / "events.tsv", ["--items", tmp_path / "items.tsv"])
    assert len((tmp_path / "events.tsv").read_text().splitlines()) == 1 + 24 * 2
    assert (tmp_path / "items.tsv").read_text().splitlines()[1:4] == ["i0\tx", "i1\tx", "i4\tx"]


def test_datasets_must_be_of_known_sets(tmp_path):
    recipe = load_recipe(str(small_recipe(tmp_path / "a.toml")))
    assert shares.sets_of(recipe) == list(SETS)
    assert only(recipe, "held_out", "fsdd") == {"fsdd": {"shards": "fsdd/test-*.tar"}}
    other = replace(recipe, data=Data(train={"mine": Dataset("mine/train-*.tar")}))
    with pytest.raises(ConfigError, match=r"dataset mine: shards=mine/train-\*\.tar lie in no folder that"):
        shares.sets_of(other)


def test_shares_of_tokens_follow_weights_lengths_and_the_schedule(tmp_path):
    from megamm.data.media.features import MediaRules
    from megamm.data.samples.lengths import ensure_lengths
    from megamm.tokenizers.text import train

    recipe = load_recipe("tiny")
    train(["a b c d e f g h"] * 8, recipe.tokenizer, tmp_path / "tokenizer")
    tokens = {}
    for name, text in (("long", "a b c d e f g h a b c d e f g h"), ("short", "a")):
        tar = write_tar(tmp_path / f"{name}.tar", {f"{number}": as_files(text_document(text)) for number in range(4)})
        write_index(tar)
        tokenizer = TextTokenizer.load(tmp_path / "tokenizer")
        ensure_lengths([tar], tokenizer, MediaRules.of(recipe.model, recipe.data))
        tokens[name] = len(tokenizer.encode(text)) + 2
    data = Data(
        root=str(tmp_path),
        train={"long": Dataset("long.tar", weight=1.0), "short": Dataset("short.tar", weight=2.0)},
        schedule=(WeightChange(step=400, weights={"long": 0.0}),),
    )
    tokenizer = replace(recipe.tokenizer, folder=str(tmp_path / "tokenizer"))
    recipe = replace(recipe, tokenizer=tokenizer, data=data, train=replace(recipe.train, steps=600))
    found = token_shares(recipe)
    of_long = tokens["long"] / (tokens["long"] + 2 * tokens["short"])
    assert found == pytest.approx({"long": of_long * 400 / 600, "short": 1 - of_long * 400 / 600})


@needs_data
def test_the_longest_answer_of_the_nuclei_fits(tmp_path):
    from megamm.core.types import MediaFacts, Message, Part, Sample
    from megamm.data.media.features import MediaRules
    from megamm.data.samples.encode import SampleEncoder
    from megamm.tokenizers.text import train

    names = sorted((Path(DATA) / "nuclei256" / "instances").iterdir())
    masks = [np.asarray(Image.open(path)) for number, path in enumerate(names) if number % 5 == 4]
    most = max(np.count_nonzero(np.unique(mask)) for mask in masks)
    recipe = load_recipe("reference", ["--tokenizer.text_size=320"])
    # Such a small tokenizer cuts words into more pieces than the recipe's own.
    encoder = SampleEncoder(train(["nucleus"] * 8, recipe.tokenizer, tmp_path), MediaRules.of(recipe.model, recipe.data))
    asked = Message("user", (Part("image", member="0.png"), Part("text", "Segment every nucleus.")))

    def tokens(num_nuclei: int) -> int:
        mask = Part("mask", member="1.png", data={"image": 0, "labels": ["nucleus"] * num_nuclei})
        sample = Sample("a", "segmentation", (asked, Message("assistant", (mask,))))
        return encoder.measure(sample, {"0.png": MediaFacts("image", 256, 256), "1.png": MediaFacts("image", 256, 256)})[0].tokens

    one = tokens(2) - tokens(1)
    prompt = tokens(1) - one
    longest = longest_answer(recipe)
    assert longest is not None and 1000 < most * one <= longest
    assert prompt + longest <= recipe.model.text.config["max_position_embeddings"]


def write_shard(path: Path, text: str) -> None:
    write_index(write_tar(path, {"a": as_files(text_document(text))}))


def finished_run(work: Work, name: str = "main", source: Path | None = None, weights: str = "1") -> list[str]:
    """A run as `Work.train` leaves it, without the training: `weights` stand in its manifest. Returns its recipe's overrides."""
    for split in ("train", "test"):
        write_shard(work.shards / "mine" / f"{split}-00000.tar", split)
    overrides = tables({f"data.{part}": {"mine": {"shards": f"mine/{split}-*.tar"}} for part, split in SPLITS})
    run = work.run_folder(name)
    changes = [*work.recipe_overrides("tiny"), *overrides]
    check_run(run, "tiny", changes, source)
    write_json(run / "config.json", to_dict(load_recipe("tiny", changes)))
    write_json(run / "checkpoints" / step_folder(2) / MANIFEST, {"weights": weights})
    if source is not None:
        write_json(run / "origin.json", {"digest": digest_file(newest_manifest(source))})
    write_json(run / "DONE", {"step": 2})
    return overrides


def test_a_run_that_is_done_is_kept_for_the_same_recipe_shards_and_source_alone(tmp_path):
    work = Work(tmp_path)
    overrides = finished_run(work)
    finished_run(work, "tuned", work.run_folder("main"))
    tuned = ["finetune", work.run_folder("main"), "tiny"]
    assert work.train("main", ["pretrain", "tiny"], overrides) and work.train("tuned", tuned, overrides)
    assert work.train("main", ["pretrain", "tiny"], [*overrides, "--telemetry.every", "7"])
    with pytest.raises(ConfigError, match=r"main/run learns another recipe than tiny: data.train.mine.weight, optim.lr differ; remove "):
        work.train("main", ["pretrain", "tiny"], [*overrides, "--optim.lr", "0.5", "--data.train.mine.weight", "3.0"])
    write_json(newest_manifest(work.run_folder("main")), {"weights": "2"})
    with pytest.raises(ConfigError, match=f"tuned/run started from other weights than .* has now; remove {tmp_path / 'tuned'} "):
        work.train("tuned", tuned, overrides)
    write_shard(work.shards / "mine" / "train-00000.tar", "something else")
    with pytest.raises(ConfigError, match="main/run learns from other shards than"):
        work.train("main", ["pretrain", "tiny"], overrides)


def test_a_report_is_kept_for_the_same_weights_shards_and_options_alone(tmp_path, monkeypatch):
    commands = []

    def evaluate(self: Work, *words: object, num_ranks: int = 1) -> None:
        assert not self.report("main").exists(), "figures of something else are gone before new ones are there"
        commands.append([str(word) for word in words])
        write_json(self.report("main"), {"rows": []})

    monkeypatch.setattr(Work, "run", evaluate)
    work = Work(tmp_path)
    finished_run(work)

    def num_commands(*words: str) -> int:
        work.evaluate("main", *words)
        return len(commands)

    assert [num_commands(), num_commands()] == [1, 1]
    assert [num_commands("--max-new-tokens", "1792"), num_commands("--max-new-tokens", "1792")] == [2, 2]
    finished_run(work, weights="2")
    assert num_commands("--max-new-tokens", "1792") == 3
    write_shard(work.shards / "mine" / "test-00000.tar", "something else")
    assert num_commands("--max-new-tokens", "1792") == 4
    # Of an option that is given twice the last one counts: a quick run answers shortly.
    replace(work, quick=True).evaluate("main", "--max-new-tokens", "1792")
    assert [after for word, after in pairwise(commands[-1]) if word == "--max-new-tokens"] == ["1792", "4"]


def test_a_tokenizer_of_other_shards_or_settings_is_refused(tmp_path, monkeypatch):
    work = Work(tmp_path)
    recipe = small_recipe(tmp_path / "small.toml", ("mnist12k",))
    for split in ("train", "test"):
        write_shard(work.shards / "mnist12k" / f"{split}-0.tar", split)
    commands = []

    def learn(self, *words, num_ranks=1):
        commands.append(words)
        write_json(self.tokenizer(str(recipe)) / "vocabulary.json", {})

    monkeypatch.setattr(Work, "run", learn)
    work.make_tokenizer(str(recipe))
    work.make_tokenizer(str(recipe))
    assert len(commands) == 1
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("text_size = ", "text_size = 1"), encoding="utf-8")
    with pytest.raises(ConfigError, match="was learned from other shards or by other settings; remove"):
        work.make_tokenizer(str(recipe))
    recipe.write_text(text, encoding="utf-8")
    write_shard(work.shards / "mnist12k" / "test-0.tar", "what is held out teaches no piece")
    work.make_tokenizer(str(recipe))
    write_shard(work.shards / "mnist12k" / "train-0.tar", "another")
    with pytest.raises(ConfigError, match="was learned from other shards"):
        work.make_tokenizer(str(recipe))
    assert len(commands) == 1


def test_training_is_timed_over_all_commands_and_what_fails_as_well(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 40.0, 100.0, 100.0, 102.0])
    monkeypatch.setattr(work_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def train(self: Work, *words: object, num_ranks: int = 1) -> None:
        if words[0] == "pretrain":
            raise MegaMMError("no space left")

    monkeypatch.setattr(Work, "run", train)
    work = Work(tmp_path)
    # The recipe's own, which its tokenizer is learned from, and what it trains on here.
    for name in ("digits", "words", "text", "mine"):
        write_shard(work.shards / name / "train-00000.tar", "train")
    for seconds in (40.0, 42.0):
        with pytest.raises(MegaMMError, match="no space left"):
            work.train("main", ["pretrain", "tiny"], tables({"data.train": {"mine": {"shards": "mine/train-*.tar"}}}))
        assert work.seconds("main") == seconds


def test_rows_of_one_task_are_full_of_it(tmp_path):
    from megamm.data.media.features import MediaRules
    from megamm.data.samples.lengths import ensure_lengths
    from megamm.prepare.stats import recipe_stats
    from megamm.tokenizers.text import train

    ask = {"type": "text", "text": "Which digit is this?"}
    for name, task, part, members in (
        ("pictures", "classification", "image", {"_0_png": jpeg(28, 28, format="PNG")}),
        ("sounds", "speech_recognition", "audio", {"_0_flac": flac(4000)}),
    ):
        member = {"type": part, "member": next(iter(members))[1:].replace("_", ".")}
        samples = {str(number): as_files(chat([member, ask], str(number % 10), task=task), **members) for number in range(600)}
        tar = write_tar(tmp_path / f"{name}.tar", samples)
        write_index(tar)
        words = [f"--data.root={tmp_path}", f"--tokenizer.folder={tmp_path / 'tokenizer'}", "--tokenizer.text_size=320"]
        words += tables({"data.train": {name: {"shards": f"{name}.tar"}}, "data.held_out": {}, **ONE_TASK})
        recipe = load_recipe("reference", words)
        if not (tmp_path / "tokenizer").is_dir():
            train([ask["text"], "0 1 2 3 4 5 6 7 8 9"] * 8, recipe.tokenizer, tmp_path / "tokenizer")
        tokenizer = TextTokenizer.load(tmp_path / "tokenizer")
        ensure_lengths([tar], tokenizer, MediaRules.of(recipe.model, recipe.data))
        recipe = load_recipe("reference", [*words, *tables(room(recipe))])
        packing = recipe_stats(recipe, tokenizer).packing
        assert packing is not None and np.mean(packing.fills["tokens"]) >= 0.95


def test_shards_of_other_data_are_refused(tmp_path, monkeypatch):
    def prepare(self: Work, *words: object, num_ranks: int = 1) -> None:
        (self.shards / "tiny_shakespeare").mkdir(parents=True)

    monkeypatch.setattr(Work, "run", prepare)
    monkeypatch.setattr(shares, "SETS", {"tiny_shakespeare": ("plays", lambda data, scratch: [("text", data / "a.txt")])})
    work = Work(tmp_path / "work")
    for data in ("one", "other"):
        (tmp_path / data / "plays").mkdir(parents=True)
    shares.make_shards(work, tmp_path / "one", ["tiny_shakespeare"])
    shares.make_shards(work, tmp_path / "one", ["tiny_shakespeare"])
    folder = work.shards / "tiny_shakespeare"
    with pytest.raises(ConfigError, match=rf"was made otherwise \(from\); remove {folder} to make it anew"):
        shares.make_shards(work, tmp_path / "other", ["tiny_shakespeare"])
    folder.rmdir()
    shares.make_shards(work, tmp_path / "other", ["tiny_shakespeare"])


def test_shards_that_hold_out_what_they_teach_are_refused(tmp_path, monkeypatch):
    def prepare(self: Work, *words: object, num_ranks: int = 1) -> None:
        for split in ("train", "test"):
            write_shard(self.shards / "plays" / f"{split}-00000.tar", "the same")
            write_json(self.shards / "plays" / f"{split}-report.json", {"shards": [], "num_samples": 1, "num_skipped": 0})

    monkeypatch.setattr(Work, "run", prepare)
    monkeypatch.setattr(shares, "SETS", {"plays": (".", lambda data, scratch: [("text", data / "a.txt")])})
    work = Work(tmp_path / "work")
    for _ in range(2):
        with pytest.raises(DataError, match="1 samples of test are in train as well"):
            shares.make_shards(work, tmp_path, ["plays"])


def setting(tmp_path: Path, data: str = DATA) -> Setting:
    return Setting(Work(tmp_path / "work"), Path(data), str(small_recipe(tmp_path / "small.toml")))


@needs_data
@pytest.mark.integration
def test_what_is_missing_is_in_the_table_and_holds_no_goal(tmp_path):
    rows = {row.row: row for row in table.rows_of(setting(tmp_path))}
    wanted = [row for row in rows.values() if row.goal]
    assert len(wanted) == 14 and all(row.value == table.NOT_RUN and row.holds is False for row in wanted)
    assert rows["fsdd, a speaker left out: mean accuracy"].peer.endswith("not run: george, jackson, lucas, nicolas, theo, yweweler")
    assert rows["online_retail, new items: R@10"].peer == "popularity 0.0344; co-occurrence 0.0810"


def test_what_is_missing_may_stay_as_an_earlier_table_has_it(tmp_path):
    earlier = [Row("a", 0.5, "s", "", None, "ours"), Row("b", 1.0), Row("c", table.NOT_RUN), Row("gone", 1.0), Row("e", 0.2, goal=">= 0.1")]
    path = results.write("some", "a command", earlier, folder=tmp_path)
    rows = [Row(name, table.NOT_RUN) for name in "acd"] + [Row("b", 2.0, "", "", None, "new"), Row("e", table.NOT_RUN, goal=">= 0.3")]
    kept = table.kept(rows, path)
    mark = "of an earlier work folder"
    assert [(row.row, row.value, row.unit, row.peer, row.holds) for row in kept] == [
        ("a", 0.5, "s", f"ours; {mark}", None),
        ("c", table.NOT_RUN, "", "", None),
        ("d", table.NOT_RUN, "", "", None),
        ("b", 2.0, "", "new", None),
        ("e", 0.2, "", mark, False),
    ]
    results.write("some", "a command", kept, folder=tmp_path)
    assert table.kept(rows, path) == kept
    assert table.kept(rows, tmp_path / "absent.json") == rows


def test_figures_are_found_by_the_set_that_an_evaluation_read(tmp_path):
    row = {"dataset": "cells", "metric": "map50", "slice": "", "value": 0.61, "low": 0.5, "high": 0.7, "samples": 72, "chance": None}
    report = {
        "rows": [{**row, "slice": "a=b", "value": 0.1}, row],
        "settings": {"datasets": {"cells": "/x/bccd_320/test-*.tar"}},
        "step": 4,
        "unfinished": {"cells/detection": 3, "other/detection": 5},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = table.Evaluated(tmp_path)
    figure = next(one for one in table.FIGURES if one.set == "bccd_320")
    assert table._figure_row(found, figure) == Row(
        "bccd by tokens: mAP50",
        0.61,
        "",
        ">= 0.50",
        None,
        "floor: YOLOv7 0.906 on another split; 95 %: 0.5 to 0.7; 72 samples; 3 answers cut off",
    )
    (tmp_path / "report.json").write_text(json.dumps({**report, "rows": [{**row, "chance": 0.25}]}))
    assert table._figure_row(table.Evaluated(tmp_path), figure).peer.endswith("; the best guess without looking: 0.25")
    assert found.row("fsdd", "map50") is None


def test_a_command_that_fails_ends_the_run(tmp_path, capfd):
    with pytest.raises(MegaMMError, match="`megamm checkpoint` ended with code 1"):
        Work(tmp_path).run("checkpoint", "list", tmp_path / "absent")
    assert f"$ megamm checkpoint list {tmp_path / 'absent'}" in capfd.readouterr().out


def test_no_data_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("MEGAMM_DATA", raising=False)
    assert main(["--parts", "main"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--parts", "main,mian"])
    assert "'mian' is no part" in capsys.readouterr().err


@needs_data
@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_part_runs_on_a_share_of_the_data_and_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "benchmarks.reference", "--quick", "--work", tmp_path / "work", "--results", tmp_path]
    command += ["--recipe", small_recipe(tmp_path / "small.toml")]
    environment = {**os.environ, "MEGAMM_DATA": DATA, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    rows = {row["row"]: row for row in json.loads((tmp_path / "reference_small-quick.json").read_text())["rows"]}
    run = [name for name, row in rows.items() if row["value"] != table.NOT_RUN]
    for name in (
        "mnist: accuracy",
        "bccd by the detector head: mAP50",
        "nuclei by the segmenter head: AP of instances",
        "goemotions, 4 groups: macro F1",
        "online_retail, new items: R@10",
    ):
        assert name in run
    assert "george 0." in rows["fsdd, a speaker left out: mean accuracy"]["peer"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    # Lengths are looked at once more, which takes no training; everything else is there.
    assert {line.split()[2] for line in again.stdout.splitlines() if line.startswith("$ megamm")} <= {"data"}
