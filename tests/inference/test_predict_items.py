"""Recommendations on the command line: asked as training samples ask, of the run that knows their items."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from megamm.cli import main
from megamm.core.errors import ConfigError, DataError
from megamm.inference import make_prompt, replies
from megamm.inference.item_trie import ItemTrie
from megamm.inference.predict import Question, Ranking, predict
from megamm.inference.ranking import rank_items
from megamm.tasks.template import parse_sample
from megamm.tokenizers import text
from megamm.tokenizers.items import ItemTable
from tests.support.preparing import samples, write_shards
from tests.support.tiny_run import SENTENCES, TOKENIZER, write_run

BASKETS = {"ann": ["cup hat", "lamp", "mug shoe", "cup"], "bob": ["lamp mug", "bag", "hat"]}
TEXTS = {"cup": "say 1", "hat": "What digit", "lamp": "the number", "mug": "one, again", "shoe": "two; three", "late": "nobody met it"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards of both ways to show items, and a run whose tokenizer has the items that stand beside them."""
    root = tmp_path_factory.mktemp("shop")
    events = [f"{user},{item},{day}" for user, baskets in BASKETS.items() for day, basket in enumerate(baskets) for item in basket.split()]
    (root / "events.csv").write_text("\n".join(["user,item,time", *events]) + "\n")
    (root / "items.csv").write_text("\n".join(["item,text", *(f'{item},"{words}"' for item, words in TEXTS.items())]) + "\n")
    for show in ("text", "codes"):
        write_shards("interactions", root / show, input=root / "events.csv", map=(), items=root / "items.csv", show=show)
    lines = [json.loads(line) for line in (root / "text" / "items.jsonl").read_text().splitlines()]
    codes = np.array([[row // 3, row % 3] for row in range(len(lines))], dtype=np.int32)
    items = ItemTable(tuple(one["id"] for one in lines), tuple(one["text"] for one in lines), codes, 3)
    pieces = text.train(SENTENCES * 4, replace(TOKENIZER, item_levels=2, item_codes=3), root / "run" / "tokenizer", items=items)
    return root, write_run(root / "run", pieces=pieces)


def history(document):
    """The baskets that a sample shows."""
    words = "".join(part["id"] + "," if part["type"] == "item" else ";" for part in document["messages"][0]["content"][:-1])
    return [basket.strip(",").split(",") for basket in words.split(";") if basket]


def said(capsys, root, *words):
    """The one line that the command prints."""
    assert main(["predict", str(root / "run"), "--task", "recommendation", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def searches(monkeypatch):
    """Beams of each search that was run."""
    found, search = [], replies.beam_rank
    monkeypatch.setattr(replies, "beam_rank", lambda *words, **options: found.append(options["num_beams"]) or search(*words, **options))
    return found


def scores(line):
    return {item["id"]: item["log_probability"] for item in line["items"]}


@pytest.mark.integration
@pytest.mark.parametrize("show", ["text", "codes"])
def test_a_history_is_laid_out_as_in_training(root, show, capsys, monkeypatch):
    root, loaded = root
    document, _ = samples(root / show)["user-ann-00003"]
    shown = history(document)
    assert [len(basket) for basket in shown] == [2, 1, 2]
    asked = []
    monkeypatch.setattr(replies, "rank_items", lambda *words, **options: asked.extend(words[2]) or rank_items(*words, **options))
    line = said(capsys, root, "--items", ";".join(map(",".join, shown)), *(["--show", "codes"] if show == "codes" else []))
    sample = parse_sample("ann", document, where="ann")
    prompt = make_prompt(loaded, sample.messages[:-1], {})
    assert [one.input_ids.tolist() for one in asked] == [prompt.input_ids.tolist()]
    assert (line["history"], line["question"]) == (shown, "What comes next?")
    (expected,) = rank_items(loaded, ItemTrie.of(loaded), [prompt])
    assert scores(line) == pytest.approx({item.id: item.log_probability for item in expected}, rel=1e-4, abs=1e-3)
    assert list(scores(line).values()) == sorted(scores(line).values(), reverse=True)


def test_items_without_a_text_in_the_list_stand_as_their_codes(root):
    _, loaded = root
    asked = [Question(baskets=(("bag",),))]
    (shown,), (bare,) = (list(predict(loaded, "recommendation", asked, ranking=Ranking(shows_texts=on))) for on in (True, False))
    assert shown == bare


@pytest.mark.integration
def test_known_items_are_left_out_and_beams_find_the_same(root, capsys, searches):
    root, loaded = root
    words = "--items", "cup,hat;lamp", "--num-items", "4"
    exact = said(capsys, root, *words, "--exclude-known")
    assert set(scores(exact)) == set(loaded.tokenizer.items.ids) - {"cup", "hat", "lamp"}
    searched = said(capsys, root, *words, "--exclude-known", "--num-beams", str(len(loaded.tokenizer.items)))
    assert scores(searched) == pytest.approx(scores(exact), rel=1e-4, abs=1e-3)
    assert 1 <= len(said(capsys, root, *words, "--num-beams", "4")["items"]) <= 4
    assert searches == [len(loaded.tokenizer.items), 4]
    assert main(["predict", str(root / "run"), "--task", "recommendation", *words, "--num-beams", "3"]) == 1
    assert "3 beams find 3 items at most, and 4 are looked at; give 4 beams or more" in capsys.readouterr().err


@pytest.mark.integration
def test_an_evaluation_can_rank_with_beams(root, capsys, tmp_path, searches):
    root, loaded = root
    words = ["evaluate", str(root / "run"), "--shards", f"shop={root / 'text' / 'train-*.tar'}"]
    found = {}
    for name, beams in (("exact", []), ("beams", ["--num-beams", "50"])):
        assert main([*words, "--output", str(tmp_path / name), *beams]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        found[name] = {line["key"]: scores(line["answer"]) for line in lines}
        assert json.loads((tmp_path / name / "report.json").read_text())["settings"]["num_beams"] == (50 if beams else None)
    assert searches == [50]
    assert len(found["exact"]) == 5 and {len(ranked) for ranked in found["exact"].values()} == {len(loaded.tokenizer.items)}
    for key, ranked in found["exact"].items():
        assert found["beams"][key] == pytest.approx(ranked, rel=1e-4, abs=1e-3)
    capsys.readouterr()
    assert main([*words, "--output", str(tmp_path / "few"), "--num-beams", "20"]) == 1
    assert "20 beams find 20 items at most, and 50 are looked at" in capsys.readouterr().err


def test_what_cannot_be_recommended_is_named(root):
    _, loaded = root
    for shows_texts in (True, False):
        asked = predict(loaded, "recommendation", [Question(baskets=(("cup",), ("htas",)))], ranking=Ranking(shows_texts=shows_texts))
        with pytest.raises(DataError, match=f"item 'htas' is not among the tokenizer's {len(loaded.tokenizer.items)} items"):
            list(asked)
    for ranking in (Ranking(num_beams=10), Ranking(leaves_out_known=True), Ranking(num_items=3), Ranking(shows_texts=False)):
        with pytest.raises(ConfigError, match=re.escape("task 'captioning' ranks no items")):
            list(predict(loaded, "captioning", [Question(baskets=(("cup",),))], ranking=ranking))


def test_a_user_who_met_nothing_gets_a_ranking_as_well(root):
    _, loaded = root
    (found,) = predict(loaded, "recommendation", [Question(text="What comes next?")], ranking=Ranking(leaves_out_known=True))
    assert len(found.reply.items) == len(loaded.tokenizer.items)
