import gzip
import os
import subprocess
import sys

import pytest

from tests.support.preparing import samples, text_of

SMALL = ("bccd_320", "nuclei256", "flowers96")


def run(output, *words, data):
    environment = {name: value for name, value in os.environ.items() if name != "MEGAMM_DATA"} | (
        {"MEGAMM_DATA": str(data)} if data else {}
    )
    command = [sys.executable, "-m", "benchmarks.prepare_shared_data", "--output", str(output), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(("data", "message"), [("", "MEGAMM_DATA is not set"), ("absent", "MEGAMM_DATA=absent has no folder bccd_320")])
def test_absent_data_is_named(tmp_path, data, message):
    child = run(tmp_path / "out", data=data)
    assert (child.returncode, child.stderr.count("\n")) == (1, 1)
    assert child.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_held_out_samples_are_in_no_training_shard(tmp_path):
    lines = [f"line {number}\t第{number}行\tsomebody" for number in range(100)]
    lines[3] = lines[49]  # a repeat of the first held-out line
    (tmp_path / "data" / "tatoeba_en_zh").mkdir(parents=True)
    (tmp_path / "data" / "tatoeba_en_zh" / "cmn.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    child = run(tmp_path / "out", "--only", "tatoeba_en_zh", data=tmp_path / "data")
    assert child.returncode == 0
    assert "$ megamm prepare manifest" in child.stdout
    held_out = samples(tmp_path / "out" / "tatoeba_en_zh", "test")
    assert {text_of(document) for document, _ in held_out.values()} == {"第49行", "line 49", "第99行", "line 99"}
    learnt = samples(tmp_path / "out" / "tatoeba_en_zh")
    assert len(learnt) == 2 * (98 - 1)
    assert not {text_of(document) for document, _ in held_out.values()} & {text_of(document) for document, _ in learnt.values()}


@pytest.mark.skipif(not os.environ.get("MEGAMM_DATA"), reason="MEGAMM_DATA is not set, so there is no real data to prepare")
def test_real_data_is_prepared_with_its_splits(tmp_path):
    child = run(tmp_path, "--only", *SMALL, data=os.environ["MEGAMM_DATA"])
    assert child.returncode == 0
    counts = {(name, split): len(samples(tmp_path / name, split)) for name in SMALL for split in ("train", "validation", "test")}
    assert counts == {
        ("bccd_320", "train"): 205,
        ("bccd_320", "validation"): 87,
        ("bccd_320", "test"): 72,
        ("nuclei256", "train"): 200,
        ("nuclei256", "validation"): 0,
        ("nuclei256", "test"): 50,
        ("flowers96", "train"): 950,
        ("flowers96", "validation"): 0,
        ("flowers96", "test"): 237,
    }
