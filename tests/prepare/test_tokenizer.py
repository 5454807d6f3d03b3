from dataclasses import replace
from pathlib import Path

import pytest

from megamm.config import Data, Dataset, Model, Recipe, Tokenizer, Tower
from megamm.core.errors import ConfigError, DataError
from megamm.prepare.tokenizer import make_tokenizer, texts
from megamm.tokenizers.text import TextTokenizer
from tests.support.preparing import write_shards
from tests.support.shards import as_files, jpeg, text_document, write_tar


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    write_shards("digit_text", root / "text")
    return Recipe(
        name="test",
        model=Model(text=Tower(type="qwen3")),
        tokenizer=Tokenizer(folder=str(root / "tokenizer"), text_size=400, location_bins=10),
        data=Data(root=str(root), train={"text": Dataset("text/train-*.tar")}, held_out={"text": Dataset("text/absent-*.tar")}),
    )


def test_the_folder_is_trained_from_training_shards(recipe):
    line = make_tokenizer(recipe)
    tokenizer = TextTokenizer.load(Path(recipe.tokenizer.folder))
    assert line.startswith(f"{recipe.tokenizer.folder}: 512 ids (text 400, control 64, location 10, spare 38)")
    assert tokenizer.fingerprint in line
    assert len(tokenizer.encode("The word seven names the digit 7.")) < 16
    assert make_tokenizer(recipe) == line


def test_adopting_reads_no_shards(recipe, tmp_path):
    adopting = replace(
        recipe,
        tokenizer=replace(recipe.tokenizer, folder=str(tmp_path / "adopted"), adopt=str(tmp_path / "absent")),
        data=replace(recipe.data, train={"text": Dataset("absent-*.tar")}),
    )
    with pytest.raises(ConfigError, match=r"tokenizer\.adopt=.*absent has no tokenizer\.json"):
        make_tokenizer(adopting)
    with pytest.raises(DataError, match=r"no shard matches .*absent-\*\.tar"):
        make_tokenizer(replace(adopting, tokenizer=replace(adopting.tokenizer, adopt="")))


def test_labels_of_boxes_masks_and_items_are_texts(tmp_path):
    from megamm.data.shards.index import write_index

    question = [{"type": "image", "member": "0.jpg"}, {"type": "item", "id": "7", "text": "A lamp"}, {"type": "item", "id": "8"}]
    boxes = {"type": "boxes", "image": 0, "boxes": [{"label": "cell", "xyxy": [0, 0, 1, 1]}]}
    mask = {"type": "mask", "image": 0, "member": "1.png", "labels": ["nucleus"]}
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": [boxes, mask]}]
    picture = jpeg(2, 2)
    document = {"task": "detection", "messages": messages}
    tar = write_tar(tmp_path / "a.tar", {"a": as_files(document, _0_jpg=picture, _1_png=jpeg(2, 2, format="PNG"))})
    write_index(tar)
    assert list(texts(Data(root=str(tmp_path), train={"a": Dataset("a.tar")}))) == ["A lamp", "cell", "nucleus"]


def test_a_shard_that_is_gone_is_noticed(tmp_path):
    from megamm.data.shards.index import write_index

    for number in range(2):
        write_index(write_tar(tmp_path / f"text-{number}.tar", {"a": as_files(text_document("say"))}))
    (tmp_path / "text-1.tar").unlink()
    with pytest.raises(DataError, match=r"text-1\.tar does not exist, but its index does"):
        list(texts(Data(root=str(tmp_path), train={"text": Dataset("text-*.tar")})))


def test_no_dataset_gives_more_text_than_the_mean_one(tmp_path):
    from megamm.data.shards.index import write_index

    sizes = {"large": (2, 300), "small": (1, 40), "least": (1, 20)}
    for name, (num_shards, num_samples) in sizes.items():
        for shard in range(num_shards):
            documents = {f"{number:03}": as_files(text_document(f"{name} {shard} {number:03}")) for number in range(num_samples)}
            write_index(write_tar(tmp_path / f"{name}-{shard}.tar", documents))
    data = Data(root=str(tmp_path), train={name: Dataset(f"{name}-*.tar") for name in sizes})
    found = list(texts(data))
    large = [text for text in found if text.startswith("large")]
    assert [len(found) - len(large), found == list(texts(data))] == [60, True]
    assert len(large) == pytest.approx((600 + 40 + 20) / 3, rel=0.02)
    # Spread over all of it.
    assert len([text for text in large if text.startswith("large 1")]) == pytest.approx(len(large) / 2, abs=2)
