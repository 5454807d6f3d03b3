"""The real data as shards below the work folder; for a quick run a small share of each set."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import prepare_shared_data
from benchmarks.prepare_shared_data import SETS
from benchmarks.reference.made_of import digest_of
from benchmarks.reference.work import Work
from megamm.config import Recipe
from megamm.core.errors import ConfigError, DataError
from megamm.core.files import digest_file, read_json, write_json

_QUICK_ROWS = 24
_QUICK_CHARACTERS = 20_000


def sets_of(recipe: Recipe) -> list[str]:
    """The sets that a recipe trains on or holds out: the first folder of its shards.

    Raises:
        ConfigError: A dataset lies elsewhere.
    """
    found: dict[str, None] = {}
    for name, dataset in {**recipe.data.train, **recipe.data.held_out}.items():
        if (folder := Path(dataset.shards).parts[0]) not in SETS:
            raise ConfigError(f"dataset {name}: shards={dataset.shards} lie in no folder that benchmarks.prepare_shared_data makes")
        found[folder] = None
    return list(found)


def make_shards(work: Work, data: Path, names: Iterable[str]) -> None:
    """Prepare sets through `megamm prepare`, each once.

    Args:
        work: Where to.
        data: The folder of the real data.
        names: Of the sets.

    Raises:
        ConfigError: The data lack the folder of a set, or shards are there that were made of other data or by other rules.
        DataError: A sample stands in train and among those that are held out.
        MegaMMError: A command failed.
    """
    for name in names:
        folder, make = SETS[name]
        output, made = work.shards / name, work.shards / f".{name}.made"
        made_of = {"from": str(data / folder), "quick": work.quick, "rules": _rules()}
        if made.is_file() and output.is_dir():
            if changed := [key for key, value in made_of.items() if read_json(made).get(key) != value]:
                raise ConfigError(f"{output} was made otherwise ({', '.join(changed)}); remove {output} to make it anew")
            continue
        if not (data / folder).is_dir():
            raise ConfigError(f"{data} has no folder {folder}; set MEGAMM_DATA to the folder of the real test data")
        # What an earlier try left was made from a table that is gone.
        shutil.rmtree(output, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            for source, given, *words in make(data / folder, Path(scratch)):
                if work.quick:
                    thin(Path(str(given)), words)
                work.run("prepare", source, given, *words, "--output", output)
        # The last but one column counts held-out samples that stand in train.
        if shared := [row for row in prepare_shared_data.rows_of(output, 0.0) if row[-2]]:
            raise DataError(f"{output}: {shared[0][-2]} samples of {shared[0][1]} are in train as well; they may not be learnt from")
        write_json(made, made_of)


def _rules() -> str:
    """Digest of the code that makes shards of the data: which splits, which questions."""
    folder = Path(prepare_shared_data.__file__).parent
    return digest_of({path.name: digest_file(path) for path in (folder / "prepare_shared_data.py", *sorted(folder.glob("shared_*.py")))})


def thin(given: Path, words: Sequence[object] = ()) -> None:
    """Leave a small share of what a command is to prepare, spread evenly over it; a folder stays as it is.

    Args:
        given: A table of samples or of a shop's events, annotations of pictures, or a text.
        words: The command's options; a table behind `--items` loses the items that no event is left of.
    """
    if given.suffix == ".jsonl":
        _write_lines(given, _thin_rows(given.read_text(encoding="utf-8").splitlines()))
    elif given.suffix == ".json":
        given.write_text(json.dumps(_thin_pictures(json.loads(given.read_text(encoding="utf-8")))), encoding="utf-8")
    elif given.suffix == ".tsv":
        _thin_shop(given, Path(str(words[words.index("--items") + 1])))
    elif given.suffix == ".txt":
        given.write_text(given.read_text(encoding="utf-8")[:_QUICK_CHARACTERS], encoding="utf-8")


def _thin_rows(lines: Sequence[str]) -> list[str]:
    by_split: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        by_split[json.loads(line).get("split", "")].append(line)
    # Where the command itself holds out a share, the share of a few rows could be none.
    return [line for split, rows in by_split.items() for line in spread(rows, _QUICK_ROWS if split else 4 * _QUICK_ROWS)]


def _thin_pictures(annotations: dict[str, Any]) -> dict[str, Any]:
    images = spread(annotations["images"], _QUICK_ROWS)
    kept = {image["id"] for image in images}
    boxes = [one for one in annotations["annotations"] if one["image_id"] in kept]
    return {**annotations, "images": images, "annotations": boxes}


def _thin_shop(events: Path, items: Path) -> None:
    header, *lines = events.read_text(encoding="utf-8").splitlines()
    users = [list(group) for _, group in groupby(lines, key=lambda line: line.split("\t")[0])]
    kept = [line for group in spread(users, _QUICK_ROWS) for line in group]
    _write_lines(events, [header, *kept])
    met = {line.split("\t")[1] for line in kept}
    header, *lines = items.read_text(encoding="utf-8").splitlines()
    _write_lines(items, [header, *(line for line in lines if line.split("\t")[0] in met)])


def spread(rows: Sequence[Any], num: int) -> list[Any]:
    """At most `num` of some rows, evenly spread."""
    return [rows[index * len(rows) // num] for index in range(num)] if len(rows) > num else list(rows)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
