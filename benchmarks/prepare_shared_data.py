"""All of the project's real test data as shards, through the ordinary commands, with the splits that its README states.

    MEGAMM_DATA=… python -m benchmarks.prepare_shared_data --output data/shared [--only SET …]

What a command cannot read as it lies there (IDX files, flattened baskets, lists of who is held out) is brought into a table or a list in a
temporary folder first; nothing of the data stays anywhere but in the shards. Held-out sets are kept apart, and every set is searched for
samples that stand on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image

from benchmarks.shared_emoji import noto_emoji48, noto_emoji48_edits, noto_emoji48_faces, noto_emoji48_pictures
from benchmarks.shared_pairs import digit_matching, digit_sums
from benchmarks.shared_places import digit_places
from benchmarks.shared_tables import (
    DIGITS,
    Command,
    digit_pictures,
    every,
    jsonl,
    official_split,
    tsv,
    unpacked,
    without_held_out,
)
from megamm.data.shards.index import load_index

_FEW_DIGITS = 10
"""Of each kind, where a task is to have few samples."""


def mnist12k(data: Path, scratch: Path) -> Iterator[Command]:
    """Handwritten digits, split as given."""
    rows = [
        {"image": name, "label": str(digit), "split": split, "key": name.removesuffix(".png")}
        for split, pictures in digit_pictures(data, scratch).items()
        for name, digit in pictures
    ]
    yield "manifest", jsonl(scratch / "digits.jsonl", rows), "--prompt", "Which digit is this?"


def mnist12k_askew(data: Path, scratch: Path) -> Iterator[Command]:
    """Ten handwritten digits of each kind to learn from, turned by 45 degrees, and all test digits so."""
    rows = []
    for split, pictures in digit_pictures(data, scratch).items():
        num_left = dict.fromkeys(range(10), _FEW_DIGITS if split == "train" else len(pictures))
        for name, digit in pictures:
            if num_left[digit]:
                num_left[digit] -= 1
                with Image.open(scratch / name) as picture:
                    picture.rotate(45, Image.Resampling.BILINEAR).save(scratch / name)
                rows.append({"image": name, "label": str(digit), "split": split, "key": name.removesuffix(".png")})
    yield "manifest", jsonl(scratch / "digits.jsonl", rows), "--prompt", "Which digit is this?"


def fsdd(data: Path, scratch: Path) -> Iterator[Command]:
    """Spoken digits; takes 0 to 4 of each are the official test."""
    yield *spoken_digits(data, scratch, lambda speaker, take: official_split(take)), "--root", data


def fsdd_speakers(data: Path, scratch: Path) -> Iterator[Command]:
    """The same with a split a speaker, to leave one speaker out."""
    yield *spoken_digits(data, scratch, lambda speaker, take: speaker), "--root", data


def spoken_digits(data: Path, scratch: Path, split: Callable[[str, int], str]) -> Command:
    rows = []
    for path in sorted(data.glob("*.flac")):
        digit, speaker, take = path.stem.split("_")
        names = {"audio": path.name, "answer": DIGITS[int(digit)], "key": path.stem, "split": split(speaker, int(take))}
        rows.append({**names, "speaker": speaker, "take": int(take)})
    keep = ("--map", "speaker=metadata", "--map", "take=metadata")
    return "manifest", jsonl(scratch / "clips.jsonl", rows), "--task", "speech_recognition", *keep


def esc10_16k(data: Path, scratch: Path) -> Iterator[Command]:
    """Sounds of ten classes, a split a fold."""
    rows = [
        {
            "audio": f"{path.parent.name}/{path.name}",
            "label": path.parent.name.replace("_", " "),
            "split": f"fold{path.name[0]}",
            "key": path.stem,
        }
        for path in sorted(data.glob("*/*.ogg"))
    ]
    yield (
        "manifest",
        jsonl(scratch / "clips.jsonl", rows),
        "--root",
        data,
        "--task",
        "audio_classification",
        "--prompt",
        "What do you hear?",
    )


def cmn_words(data: Path, scratch: Path) -> Iterator[Command]:
    """Mandarin words; every 10th is held out."""
    lines = (data / "transcripts.tsv").read_text(encoding="utf-8").splitlines()
    rows = [
        {"audio": name, "answer": word, "split": every(number, 10), "key": name.removesuffix(".mp3")}
        for number, (name, word) in enumerate(line.split("\t") for line in lines)
    ]
    yield "manifest", jsonl(scratch / "words.jsonl", rows), "--root", data, "--task", "speech_recognition"


def ljspeech32(data: Path, scratch: Path) -> Iterator[Command]:
    """Sentences of one speaker, for long sounds; nothing is held out."""
    lines = (data / "metadata.csv").read_text(encoding="utf-8").splitlines()
    rows = [{"audio": f"{line.split('|')[0]}.ogg", "answer": line.split("|")[2], "key": line.split("|")[0]} for line in lines]
    yield "manifest", jsonl(scratch / "sentences.jsonl", rows), "--root", data, "--task", "speech_recognition"


def bccd_320(data: Path, scratch: Path) -> Iterator[Command]:
    """Blood cells in boxes, split as given."""
    for split, names, boxes in bccd_splits(data):
        path = scratch / f"{split}.json"
        path.write_text(json.dumps(coco(names, boxes)))
        yield "coco", path, "--root", data / "images", "--split", split, "--prompt", "Find every cell."


def bccd_320_counting(data: Path, scratch: Path) -> Iterator[Command]:
    """The same pictures with three questions each: how many of which cell."""
    cells = {"RBC": "red blood cells", "WBC": "white blood cells", "Platelets": "platelets"}
    rows = [
        {
            "image": f"{name}.jpg",
            "prompt": f"How many {what} are there?",
            "answer": str(sum(box[0] == cell for box in boxes[name])),
            "split": split,
        }
        for split, names, boxes in bccd_splits(data)
        for name in names
        for cell, what in cells.items()
    ]
    yield "manifest", jsonl(scratch / "questions.jsonl", rows), "--root", data / "images", "--task", "question_answering"


def bccd_splits(data: Path) -> Iterator[tuple[str, list[str], dict[str, list[Any]]]]:
    boxes = json.loads((data / "annotations.json").read_text())
    for split, file in (("train", "train.txt"), ("validation", "val.txt"), ("test", "test.txt")):
        yield split, (data / file).read_text().split(), boxes


def coco(names: Sequence[str], boxes: dict[str, list[Any]]) -> dict[str, Any]:
    """Boxes `[label, x1, y1, x2, y2]` in COCO's form."""
    categories = {label: number for number, label in enumerate(sorted({box[0] for found in boxes.values() for box in found}), 1)}
    annotations = [
        {"image_id": number, "category_id": categories[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for number, name in enumerate(names)
        for label, x1, y1, x2, y2 in boxes[name]
    ]
    return {
        "images": [{"id": number, "file_name": f"{name}.jpg", "width": 320, "height": 240} for number, name in enumerate(names)],
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations)],
    }


def nuclei256(data: Path, scratch: Path) -> Iterator[Command]:
    """Nuclei as instance maps; every 5th picture is held out."""
    rows = [
        {"image": f"images/{name}", "mask": f"instances/{name}", "mask_label": "nucleus", "split": every(number, 5), "key": Path(name).stem}
        for number, name in enumerate(sorted(path.name for path in (data / "images").iterdir()))
    ]
    yield "manifest", jsonl(scratch / "pictures.jsonl", rows), "--root", data, "--prompt", "Segment every nucleus."


def flowers96(data: Path, scratch: Path) -> Iterator[Command]:
    """Daisies and tulips; every 5th photograph is held out."""
    names = sorted(path.relative_to(data).as_posix() for path in data.glob("*/*.jpg"))
    (scratch / "test.txt").write_text("\n".join(name for number, name in enumerate(names) if every(number, 5) == "test"))
    yield "image_folder", data, "--test-list", scratch / "test.txt", "--prompt", "Which flower is this?"


def goemotions(data: Path, scratch: Path) -> Iterator[Command]:
    """Comments with one or more of 28 emotions; held-out texts that are in train are dropped."""
    labels = (data / "labels.txt").read_text().split()
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for split, file in (("train", "train"), ("validation", "dev"), ("test", "test")):
        lines = [line.split("\t") for line in unpacked(data / f"{file}.tsv.gz").splitlines()]
        kept = [(number, text, ids) for number, (text, ids) in enumerate(lines) if split == "train" or plain(text) not in seen]
        seen |= {plain(text) for text, _ in lines} if split == "train" else set()
        if len(kept) < len(lines):
            print(f"{split}: {len(lines) - len(kept)} texts that are in train are dropped", flush=True)
        rows += [
            {"text": text, "label": [labels[int(id_)] for id_ in ids.split(",")], "split": split, "key": f"{split}-{number:05}"}
            for number, text, ids in kept
        ]
    yield "manifest", jsonl(scratch / "comments.jsonl", rows), "--task", "sentiment", "--prompt", "Which emotions does this comment show?"


def plain(text: str) -> str:
    """A text by its words, however it is written; by its signs where it has none."""
    folded = text.casefold()
    return " ".join(re.findall(r"\w+", folded) or folded.split())


def online_retail(data: Path, scratch: Path) -> Iterator[Command]:
    """Baskets of users; the last is held out for test, the one before for validation."""
    users = [json.loads(line) for line in unpacked(data / "baskets.jsonl.gz").splitlines()]
    events = (
        (str(user["user"]), str(item), date, str(number))
        for user in users
        for number, (date, items) in enumerate(user["baskets"])
        for item in items
    )
    log = tsv(scratch / "events.tsv", chain([("user", "item", "time", "basket")], events))
    items = (line.split("\t") for line in unpacked(data / "items.tsv.gz").splitlines())
    table = tsv(scratch / "items.tsv", chain([("item", "text")], ((item, text) for item, _, text in items)))
    # Codes are learned from the texts; repeating those in every history would make rows five times as long.
    # A ranking asks for the first item alone, and what is bought together is learned from those that follow; few baskets are longer.
    shown = ("--items", table, "--show", "codes", "--hold-out", "both", "--max-answer", "24")
    yield "interactions", log, *shown, "--prompt", "What will this customer buy next?"


def tatoeba_en_zh(data: Path, scratch: Path) -> Iterator[Command]:
    """Sentence pairs, asked for in both directions; every 50th is held out, and pairs that share a side with it are dropped from train."""
    rows = []
    lines = [line.split("\t") for line in unpacked(data / "cmn.txt.gz").splitlines()]
    for number, (english, chinese, source), split in without_held_out(lines, 50, lambda line: (line[0], line[1])):
        more = {"split": split, "source": source}
        rows.append({"text": english, "answer": chinese, "prompt": "Translate to Chinese.", "key": f"en-zh-{number:05}", **more})
        rows.append({"text": chinese, "answer": english, "prompt": "Translate to English.", "key": f"zh-en-{number:05}", **more})
    yield "manifest", jsonl(scratch / "pairs.jsonl", rows), "--task", "translation", "--map", "source=metadata"


def tiny_shakespeare(data: Path, scratch: Path) -> Iterator[Command]:
    """Plays; the last tenth is held out."""
    text = unpacked(data / "input.txt.gz")
    cut = text.index("\n", len(text) * 9 // 10) + 1
    for split, part in (("train", text[:cut]), ("test", text[cut:])):
        path = scratch / f"{split}.txt"
        path.write_text(part, encoding="utf-8", newline="")
        yield "text", path, "--split", split, "--chunk-characters", 1000


def chinese_poetry(data: Path, scratch: Path) -> Iterator[Command]:
    """Poems of six collections; every 20th is held out, and its repeats are dropped from train."""
    poems = []
    for path in sorted(data.glob("*.json.gz")):
        for poem in json.loads(unpacked(path)):
            lines = next(poem[name] for name in ("content", "paragraphs", "para") if name in poem)
            title = poem.get("title") or poem.get("rhythmic") or poem.get("chapter") or ""
            about = {"title": title, "author": poem.get("author", ""), "collection": path.name.removesuffix(".json.gz")}
            poems.append({"text": "\n".join(filter(None, [title, *lines])), **about})
    held_out = without_held_out(poems, 20, lambda poem: (poem["text"],))
    rows = [{**poem, "split": split, "key": f"poem-{number:04}"} for number, poem, split in held_out]
    keep = (word for name in ("title", "author", "collection") for word in ("--map", f"{name}=metadata"))
    yield "text", jsonl(scratch / "poems.jsonl", rows), *keep


SETS: dict[str, tuple[str, Callable[[Path, Path], Iterator[Command]]]] = {
    make.__name__: (folder, make)
    for folder, make in (
        ("mnist12k", mnist12k),
        ("mnist12k", mnist12k_askew),
        ("fsdd", fsdd),
        ("fsdd", fsdd_speakers),
        ("mnist12k", digit_matching),
        ("mnist12k", digit_sums),
        ("mnist12k", digit_places),
        ("esc10_16k", esc10_16k),
        ("cmn_words", cmn_words),
        ("ljspeech32", ljspeech32),
        ("bccd_320", bccd_320),
        ("bccd_320", bccd_320_counting),
        ("nuclei256", nuclei256),
        ("noto_emoji48", noto_emoji48),
        ("noto_emoji48", noto_emoji48_pictures),
        ("noto_emoji48", noto_emoji48_edits),
        ("noto_emoji48", noto_emoji48_faces),
        ("flowers96", flowers96),
        ("goemotions", goemotions),
        ("online_retail", online_retail),
        ("tatoeba_en_zh", tatoeba_en_zh),
        ("tiny_shakespeare", tiny_shakespeare),
        ("chinese_poetry", chinese_poetry),
    )
}
"""Name of a set of shards -> the folder that it is made from, and what makes the words of its commands."""


def main() -> int:
    """Prepare the sets and print a table; 1 where the data is missing, a command fails or a sample stands on both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/shared"), help="a folder a set is made below it")
    parser.add_argument("--only", nargs="+", choices=sorted(SETS), default=list(SETS), metavar="SET", help=f"some of: {', '.join(SETS)}")
    arguments = parser.parse_args()
    if not os.environ.get("MEGAMM_DATA"):
        print("MEGAMM_DATA is not set; point it at the folder of the real test data to make shards of it", file=sys.stderr)
        return 1
    data = Path(os.environ["MEGAMM_DATA"])
    if missing := sorted({SETS[name][0] for name in arguments.only if not (data / SETS[name][0]).is_dir()}):
        print(f"MEGAMM_DATA={data} has no folder {missing[0]}; point it at the folder of the real test data", file=sys.stderr)
        return 1
    table: list[tuple[object, ...]] = []
    for name in arguments.only:
        folder, make = SETS[name]
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            for source, given, *words in make(data / folder, Path(scratch)):
                run([source, given, *words, "--output", arguments.output / name])
        table += rows_of(arguments.output / name, time.monotonic() - started)
    widths = [max(len(str(row[column])) for row in [HEADER, *table]) for column in range(len(HEADER))]
    for row in [HEADER, *table]:
        print(
            "  ".join(
                f"{value!s:>{width}}" if column > 1 else f"{value!s:<{width}}"
                for column, (value, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    return 1 if any(row[-2] for row in table) else 0


HEADER = ("set", "split", "samples", "shards", "MB", "skipped", "in train too", "seconds")


def run(words: Sequence[object]) -> None:
    """Print a command and run it; end with its code when it fails."""
    command = ["megamm", "prepare", *map(str, words)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "megamm.cli", *command[1:]], check=False).returncode
    if code:
        sys.exit(code)


def rows_of(output: Path, seconds: float) -> Iterator[tuple[object, ...]]:
    """A row of the table a split."""
    learnt = set(contents(output, "train"))
    for number, path in enumerate(sorted(output.glob("*-report.json"))):
        split, report = path.name.removesuffix("-report.json"), json.loads(path.read_text())
        size = sum(shard["num_bytes"] for shard in report["shards"]) / 1e6
        shared = sum(content in learnt for content in contents(output, split)) if split in ("test", "validation") else 0
        counts = (f"{report['num_samples']:,}", len(report["shards"]), f"{size:.1f}", report["num_skipped"], shared)
        yield output.name if not number else "", split, *counts, f"{seconds:.1f}" if not number else ""


def contents(output: Path, split: str) -> Iterator[tuple[object, ...]]:
    """What each sample says and shows, and which event of a user it is, without its key and other metadata."""
    for tar in sorted(output.glob(f"{split}-*.tar")):
        index = load_index(tar)
        with tar.open("rb") as file:
            for sample in range(index.num_samples):
                members = {member.suffix: member for member in index.members(sample)}
                document = members.pop("json")
                found = json.loads(os.pread(file.fileno(), document.size, document.offset))
                yield (
                    json.dumps([found["messages"], found.get("user"), found.get("basket")], sort_keys=True),
                    *(xxhash.xxh3_64_hexdigest(os.pread(file.fileno(), member.size, member.offset)) for member in members.values()),
                )


if __name__ == "__main__":
    sys.exit(main())
