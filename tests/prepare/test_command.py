import json
import signal
import subprocess
import sys
import time

import pytest

from megamm.cli import main
from megamm.prepare import SOURCES
from tests.support.preparing import samples, text_of
from tests.support.shards import flac, jpeg
from tests.support.signals import hear_interrupts


def run(capsys, *words):
    code = main(["prepare", *map(str, words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def pictures(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "in" / label / f"{number}.jpg").write_bytes(jpeg(4, 3, seed=number))
    return tmp_path / "in"


def test_a_command_says_what_it_wrote(capsys, tmp_path, pictures):
    (tmp_path / "test.txt").write_text("cat/1.jpg\ndog/3.jpg\n")
    words = [
        "image_folder",
        pictures,
        "--output",
        tmp_path / "out",
        "--test-list",
        tmp_path / "test.txt",
        "--prompt",
        "Who?",
        "--workers",
        1,
    ]
    code, out, _ = run(capsys, *words, "--max-samples-per-shard", 4)
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path}/out/test-*.tar: 2 samples in 1 shard, 0.0 MB",
        f"{tmp_path}/out/train-*.tar: 6 samples in 2 shards, 0.0 MB",
    ]
    assert {text_of(document, 0) for document, _ in samples(tmp_path / "out").values()} == {"Who?"}


def test_repeated_flags_and_parts(capsys, tmp_path):
    (tmp_path / "a.flac").write_bytes(flac(800))
    (tmp_path / "rows.tsv").write_text("".join(f"a.flac\tseven\t{n}\n" for n in range(4)))
    words = ["manifest", tmp_path / "rows.tsv", "--columns", "file,said,take", "--map", "file=audio", "--map", "said=answer"]
    words += ["--map", "take=metadata", "--task", "speech_recognition", "--output", tmp_path / "out", "--workers", 1]
    words += ["--max-samples-per-shard", 1, "--max-bytes-per-shard", "1M", "--seed", 5, "--split", "dev"]
    code, out, _ = run(capsys, *words, "--part", "1/2")
    assert (code, "2 of 4 shards are left to other parts" in out) == (0, True)
    assert run(capsys, *words, "--part", "0/2")[0] == 0
    assert sorted(document["take"] for document, _ in samples(tmp_path / "out", "dev").values()) == ["0", "1", "2", "3"]
    assert json.loads((tmp_path / "out" / "dev-report.json").read_text())["made_from"]["seed"] == 5


def test_an_interrupted_command_says_how_to_go_on(tmp_path):
    (tmp_path / "a.txt").write_text("a line\n" * 60_000)
    words = [
        "text",
        tmp_path / "a.txt",
        "--documents",
        "line",
        "--max-samples-per-shard",
        500,
        "--workers",
        1,
        "--output",
        tmp_path / "out",
    ]
    command = [sys.executable, "-m", "megamm.cli", "prepare", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts) as process:
        interrupt_when(tmp_path / "out" / "train-00001.tar", process)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert error.splitlines()[-1] == "megamm: interrupted; finished shards are kept, run the same command again to go on"
    assert len(list((tmp_path / "out").glob("*.tar"))) in range(2, 120)
    assert not list((tmp_path / "out").glob(".*.tmp"))


def interrupt_when(path, process):
    """What ctrl-c does, once the first shards are there."""
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if path.exists():
            process.send_signal(signal.SIGINT)
            return
        time.sleep(0.005)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_explains_itself(capsys, source):
    with pytest.raises(SystemExit) as ended:
        main(["prepare", source, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in SOURCES[source].options:
        assert option.flag in shown
    assert ("INPUT" in shown) == bool(SOURCES[source].input)


def test_the_sources_are_listed(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in SOURCES)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["coco", "absent.json"], 1, "megamm: the input absent.json does not exist; check the path"),
        (["image_folder", "IN", "--map", "a=b"], 1, "megamm: '--map' is not an argument of `megamm prepare`; see its --help"),
        (["manifest", "IN/a.csv", "--map", "image=picture"], 1, "megamm: --map image=picture: there is no field 'picture'"),
        (["image_folder", "IN", "--part", "2/2"], 1, "megamm: --part 2/2 does not exist"),
        (["image_folder", "IN", "--test-list", "absent.txt"], 1, "megamm: --test-list absent.txt cannot be read"),
        (["image_folder", "IN", "--part", "two"], 2, "'two' is not I/N, such as 0/16"),
        (["image_folder", "IN", "--max-bytes-per-shard", "1T"], 2, "'1T' is no size"),
        (["image_folder", "IN", "--workers", "0"], 2, "'0' is not a whole number of at least 1"),
        (["manifest", "IN/a.csv", "--map", "image"], 2, "'image' is not COLUMN=FIELD"),
        (["text", "IN", "--documents", "page"], 2, "'page' is none of file, line, blank-line"),
        (["faces", "IN"], 2, "invalid choice: 'faces'"),
        (["manifest"], 2, "the following arguments are required: INPUT"),
    ],
)
def test_words_that_mean_nothing_are_named(capsys, tmp_path, pictures, words, code, message):
    (pictures / "a.csv").write_text("image,label\ncat/0.jpg,cat\n")
    words = [word.replace("IN", str(pictures)) for word in words]
    try:
        found = main(["prepare", *words, "--output", str(tmp_path / "out")])
    except SystemExit as ended:
        found = ended.code
    shown = capsys.readouterr().err
    assert (found, message in shown) == (code, True)
    assert code == 2 or shown.count("\n") == 1
    assert not (tmp_path / "out").exists()
