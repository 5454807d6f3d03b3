"""Indexing and verifying many shards: whatever is wrong with some, the others are done and everything is told."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megamm.cli import main
from megamm.config import Dataset
from megamm.config.schema import SampleMapping
from megamm.core.errors import DataError
from megamm.data.shards.index import index_path, load_index, write_index
from megamm.prepare.verify import check_all, find_all, stray_files
from megamm.tokenizers.text import TextTokenizer
from megamm.train.data import plan_all_lengths
from tests.support.runs import make_data, recipe_over
from tests.support.shards import as_files, chat, flac, jpeg, text_document, write_tar


@pytest.fixture
def shards(tmp_path):
    """Six shards of text and one with a picture whose header is broken."""
    tars = [
        write_tar(tmp_path / f"text-{shard:05d}.tar", {f"s{shard}-{number}": as_files(text_document("say one")) for number in range(3)})
        for shard in range(6)
    ]
    broken = chat([{"type": "image", "member": "0.jpg"}], "one")
    samples = {
        "good": as_files(broken, _0_jpg=jpeg(8, 8)),
        "bad": as_files(broken, _0_jpg=b"no picture"),
        "worse": as_files(broken, _0_jpg=b"?"),
    }
    return [*tars, write_tar(tmp_path / "picture-00000.tar", samples)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_shards_are_indexed_and_verified_whatever_the_others_are(shards, tmp_path, num_workers):
    shards[1].write_bytes(shards[1].read_bytes()[:700])
    indexed = list(check_all(shards, tmp_path, write=True, num_workers=num_workers))
    assert [one.shard for one in indexed] == [str(tar) for tar in shards]
    assert [bool(one.refused) for one in indexed] == [number == 1 for number in range(7)]
    assert [index_path(tar).exists() for tar in shards] == [number != 1 for number in range(7)]
    assert sum(indexed[6].problems.values()) == 2 and indexed[6].num_samples == 3

    content = bytearray(shards[2].read_bytes())
    content[600] ^= 1
    shards[2].write_bytes(content)
    verified = list(check_all(shards, tmp_path, write=False, num_workers=num_workers))
    assert [bool(one.refused) for one in verified] == [False, True, True, False, False, False, False]
    assert "changed since it was indexed" in verified[2].refused
    assert verified[0].digest == load_index(shards[0]).digest and verified[6].problems == indexed[6].problems


def test_the_commands_name_everything_and_end_non_zero(shards, tmp_path, capsys):
    pattern = [str(tmp_path / "text-{00000..00005}.tar"), str(shards[6])]
    assert main(["data", "index", *pattern, "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": 3 samples") == 7 and "samples that cannot be used, because" in printed
    shards[0].unlink()
    shards[3].write_bytes(shards[3].read_bytes()[:512])
    (tmp_path / ".text-00009.tar.77.tmp").write_bytes(bytes(10))
    assert main(["data", "verify", *pattern, "--workers", "2"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("digest") == 5 and ".text-00009.tar.77.tmp" in printed.out
    assert "text-00000.tar" in printed.out and "text-00003.tar" in printed.out
    assert printed.err.strip() == "megamm: 2 of 7 shards are refused; each is named above"


def test_what_is_no_file_is_refused_with_its_name_and_not_waited_for(shards, tmp_path, capsys):
    folder, pipe = tmp_path / "folder.tar", tmp_path / "pipe.tar"
    folder.mkdir()
    os.mkfifo(pipe)
    for path in (folder, pipe):
        assert main(["data", "index", str(path)]) == 1
        assert capsys.readouterr().err.strip() == f"megamm: shard {path} is no file; name a tar archive"
    index_path(shards[0]).mkdir()
    assert main(["data", "index", str(shards[0])]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"megamm: shard {shards[0]}: ") and error.endswith("; put that right and run the same command again")


def test_reasons_are_counted_whatever_the_samples_are_called(tmp_path, capsys):
    samples = {name: {"jpg": jpeg(8, 8), "txt": b""} for name in ("daisy-a", "tulip-b", "rose-c")}
    tar = write_tar(tmp_path / "captions.tar", samples)
    make_data(tmp_path, num_each=6)
    assert main(["data", "index", str(tar)]) == 0
    captions = Dataset("captions.tar", mapping=SampleMapping(task="captioning", image="jpg", answer="txt"))
    recipe = recipe_over(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, train={"captions": captions}, held_out={}))
    lines = []
    with pytest.raises(DataError, match=r"dataset captions \(train\): none of its samples can be used"):
        lines.extend(plan_all_lengths(recipe, TextTokenizer.load(Path(recipe.tokenizer.folder))))
    first, reason = lines
    assert "3 samples, 0 tokens, 3 that cannot be used" in first
    assert reason.strip() == "3: … …: ….txt is empty, which mapping.answer names"
    capsys.readouterr()
    assert main(["data", "verify", str(tar)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "is empty" in line]
    assert len(rows) == 1 and rows[0][-1] == "3"


def test_planned_lengths_are_verified_too(tmp_path, capsys):
    make_data(tmp_path, num_each=6)
    recipe = recipe_over(tmp_path)
    list(plan_all_lengths(recipe, TextTokenizer.load(Path(recipe.tokenizer.folder))))
    tar = tmp_path / "texts" / "train-00000.tar"
    (lengths,) = tmp_path.glob("texts/*.lengths-*")
    assert main(["data", "verify", str(tar)]) == 0
    assert "planned lengths: 1" in capsys.readouterr().out
    whole = lengths.read_bytes()
    lengths.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["data", "verify", str(tar)]) == 1
    assert lengths.name in capsys.readouterr().err
    lengths.write_bytes(whole)
    # The same lengths beside another shard of the same name are stale.
    write_index(write_tar(tar, {"a": as_files(chat([{"type": "audio", "member": "0.flac"}], "one"), _0_flac=flac(9000))}))
    assert main(["data", "verify", str(tar)]) == 1
    assert "belongs to another version of the shard" in capsys.readouterr().err


def test_each_shard_is_looked_at_once_and_folders_for_stray_files(shards, tmp_path):
    found = find_all([str(tmp_path / "text-{00000..00001}.tar"), str(shards[0])], tmp_path)
    assert found == shards[:2]
    shutil.copy(shards[0], tmp_path / ".text-00000.tar.1.tmp")
    assert stray_files(found) == [tmp_path / ".text-00000.tar.1.tmp"]
