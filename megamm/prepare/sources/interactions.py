"""Behaviour logs: what each user met, in the order of time, becomes histories with the basket that came next.

A sample shows up to `--history` items that a user met and asks for the items of the next basket. Events of one user at one time are a
basket, or those that share a value of the column `basket`. Its items stand in an order drawn from their names: many logs sort a basket by
something, and a model that learned what comes first would rank items by that instead of by how likely they are bought. A ranking
asks for the first item alone, so `--max-answer` lets training see more baskets in as many tokens. With `--hold-out both` a user's last
basket is asked for in `test` only and the one before in `validation` only, so that neither is ever an answer, or a part of a history, in
training.

`items.jsonl` beside the shards lists all items, those of held-out baskets and those that nobody met included: codes are made for the whole
shop, and nothing in the list tells who met what, when or how often.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megamm.core.errors import ConfigError, DataError
from megamm.core.files import canonical_json, digest_text
from megamm.prepare.columns import map_option, need, resolve
from megamm.prepare.fields import as_text
from megamm.prepare.inputs import existing_input
from megamm.prepare.names import plain_key
from megamm.prepare.rows import COLUMNS, Table, is_text, open_table
from megamm.prepare.source import PROMPT, Draft, Listing, Option, Record, Source, count, one_of
from megamm.tasks.recommendation import BASKET_END
from megamm.tokenizers.items import ITEMS_FILE

_FIELDS = {
    "user": "who",
    "item": "what; an id without any order in it, because an order tells what comes later",
    "time": "when: a number, or text that sorts by time such as 2011-12-09",
    "basket": "what belongs together (default: the same time)",
}
_SORTABLE = re.compile(r"\d{4}([-/.]?)\d\d(\1\d\d([T ]\d\d(:?\d\d(:?\d\d([.,]\d+)?)?)?(?P<zone> ?(Z|UTC|[+-]\d\d(:?\d\d)?))?)?)?")
_QUESTION = "What comes next?"
_SHOWN = {"text": "its codes and its text", "codes": "its codes alone"}
_HELD_OUT = {"none": (), "test": ("test",), "both": ("test", "validation")}


@dataclass(frozen=True, slots=True)
class _Basket:
    """What a user met at once: the time as written, and item ids without repeats."""

    time: str
    items: tuple[str, ...]


@dataclass
class _Log:
    """Events by user while the file is read. State: user -> basket name -> (time, items), both in the order of the file."""

    users: dict[str, dict[str, tuple[str, dict[str, None]]]] = field(default_factory=dict)
    num_repeats: int = 0

    def add(self, user: str, item: str, time: str, basket: str) -> None:
        _, items = self.users.setdefault(user, {}).setdefault(basket, (time, {}))
        self.num_repeats += item in items
        items[item] = None


def _records(
    *,
    input: Path,
    map: Sequence[tuple[str, str]],
    columns: Sequence[str],
    history: int,
    hold_out: str,
    max_answer: int | None,
    items: Path | None,
    show: str,
    prompt: str,
) -> Listing:
    """Every basket that something came before is a record, under its user.

    Raises:
        ConfigError: INPUT is no table, or a column is missing.
        DataError: Times are of two kinds, or the table cannot be read.
    """
    table = open_table(existing_input(input, folder=False), columns)
    log, notes = _read_log(table, map)
    texts = _read_items(items) if items else {}
    met = {item for baskets in log.users.values() for _, names in baskets.values() for item in names}
    if texts and (unknown := sorted(met - texts.keys())):
        notes.append(f"{len(unknown)} items are not in {items}, the first is {unknown[0]!r}; they come without a text")
    order = _order(time for baskets in log.users.values() for time, _ in baskets.values())
    records = []
    num_short = 0
    for user, found in log.users.items():
        drawn = (_Basket(time, _in_drawn_order(user, time, names)) for time, names in found.values())
        baskets = sorted(drawn, key=lambda basket: order(basket.time))
        num_short += len(baskets) == 1
        records += _records_of(user, tuple(baskets), _HELD_OUT[hold_out], history=history, max_answer=max_answer)
    if num_short:
        notes.append(f"{num_short} users have one basket only, which nothing came before")
    return Listing(
        records,
        partial(_make, prompt=prompt or _QUESTION, texts=texts if show == "text" else {}),
        notes,
        {ITEMS_FILE: _item_list(met, texts)},
    )


def _in_drawn_order(user: str, time: str, items: Iterable[str]) -> tuple[str, ...]:
    """The same for equal logs, another one for each basket."""
    return tuple(sorted(items, key=lambda item: digest_text(canonical_json([user, time, item]))))


def _item_list(met: Iterable[str], texts: Mapping[str, str]) -> bytes:
    """A line an item, by id; what is no Unicode is left out, as it is of samples."""
    known = sorted(item for item in {*met, *texts} if item and is_text(item))
    described = {item: texts.get(item, "") for item in known}
    return "".join(canonical_json({"id": item, "text": text if is_text(text) else ""}) + "\n" for item, text in described.items()).encode()


def _records_of(
    user: str, baskets: tuple[_Basket, ...], held_out: Sequence[str], *, history: int, max_answer: int | None
) -> Iterator[Record]:
    for target in range(1, len(baskets)):
        before_last = len(baskets) - 1 - target
        split = held_out[before_last] if before_last < len(held_out) else ""
        shown = _shown(baskets[:target], history)
        # Items stand in drawn order, so the first are any. What is held out stays whole: it is what rankings are judged by.
        asked = baskets[target] if split else replace(baskets[target], items=baskets[target].items[:max_answer])
        num_items = sum(len(basket.items) for basket in (*shown, asked))
        yield Record(f"user-{plain_key(user)}-{target:05}", 16 * num_items, (user, shown, asked, target), split, user)


def _shown(baskets: Sequence[_Basket], history: int) -> tuple[_Basket, ...]:
    """The last `history` items of some baskets, as baskets."""
    shown: list[_Basket] = []
    for basket in reversed(baskets):
        if history <= 0:
            break
        shown.append(_Basket(basket.time, basket.items[-history:]))
        history -= len(basket.items)
    return tuple(reversed(shown))


def _make(record: Record, *, prompt: str, texts: Mapping[str, str]) -> Draft:
    user, shown, target, number = record.data
    question: list[dict[str, Any]] = []
    for basket in shown:
        question += [_item(item, texts) for item in basket.items]
        question.append({"type": "text", "text": BASKET_END})
    question.append({"type": "text", "text": prompt})
    answer = [_item(item, texts) for item in target.items]
    document = {
        "task": "recommendation",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "user": user,
        "time": target.time,
        "basket": number,
    }
    return Draft(document)


def _item(item: str, texts: Mapping[str, str]) -> dict[str, str]:
    return {"type": "item", "id": item} | ({"text": texts[item]} if texts.get(item) else {})


def _read_log(table: Table, map: Sequence[tuple[str, str]]) -> tuple[_Log, list[str]]:
    columns = resolve(map, table.columns, _FIELDS, where=str(table.path))
    user, item, time = (need(columns, field, table.columns, str(table.path)) for field in ("user", "item", "time"))
    basket = columns["basket"][0] if "basket" in columns else ""
    log, problems = _Log(), []
    for row in table.rows():
        try:
            values = {name: _text(row.values, name) for name in (user, item, time, basket) if name} if not row.problem else {}
        except DataError as error:
            problems.append(f"line {row.number}: {error}")
            continue
        if row.problem:
            problems.append(row.problem)
        else:
            log.add(values[user], values[item], values[time], values[basket] if basket else values[time])
    notes = []
    if problems:
        notes.append(f"{len(problems)} events cannot be used, the first: {problems[0]}")
    if log.num_repeats:
        notes.append(f"{log.num_repeats} events repeat an item of their basket")
    return log, notes


def _text(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    text = str(value) if isinstance(value, float) else as_text(value)
    if not text or not is_text(text):
        raise DataError(f"column {column} is empty" if not text else f"column {column} is no whole Unicode")
    return text


def _order(times: Iterable[str]) -> Callable[[str], Any]:
    """What times are sorted by: their number where all are numbers, else their text.

    Raises:
        DataError: They are of two kinds, or of one that does not sort by time.
    """
    numbers = texts = ""
    zones: dict[str, str] = {}
    for time in times:
        if _is_number(time):
            numbers = time
        elif found := _SORTABLE.fullmatch(time):
            texts = time
            zones.setdefault(found["zone"] or "", time)
        else:
            raise DataError(f"the time {time!r} does not sort as text; write all as numbers or all as 2011-12-09 08:30:00")
        if len(zones) > 1:
            raise DataError(f"times are of several time zones ({', '.join(map(repr, zones.values()))}); write all in one")
        if numbers and texts:
            raise DataError(f"times are numbers and texts ({numbers!r}, {texts!r}); write all as numbers or all as 2011-12-09 08:30:00")
    return str if texts else float


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _read_items(path: Path) -> dict[str, str]:
    table = open_table(existing_input(path, folder=False))
    if missing := sorted({"item", "text"} - set(table.columns)):
        raise ConfigError(f"--items {path} has no column {missing[0]}; it needs item and text, its columns are {', '.join(table.columns)}")
    return {as_text(row.values.get("item")): as_text(row.values.get("text")) for row in table.rows() if not row.problem}


SOURCE = Source(
    name="interactions",
    help="behaviour logs, one event a row, as histories of items with the basket that came next",
    records=_records,
    input="a csv, tsv or jsonl file of events, maybe gzipped",
    options=(
        map_option(_FIELDS),
        COLUMNS,
        Option("history", "most items that a sample shows (default 50)", count, 50, "N"),
        Option(
            "hold_out",
            "last baskets that are asked for elsewhere: none (default), test, or both test and validation",
            one_of(*_HELD_OUT),
            "none",
            "WHAT",
        ),
        Option(
            "max_answer",
            "most items of a basket that is asked for, drawn; those of --hold-out stay whole, those of --test-share do not (default all)",
            count,
            None,
            "N",
        ),
        Option("items", "table with the columns item and text, which describes items", Path, None, "FILE"),
        Option(
            "show",
            f"what a sample says of an item: {'; '.join(f'{name} ({what})' for name, what in _SHOWN.items())}; the list keeps texts",
            one_of(*_SHOWN),
            "text",
            "WHAT",
        ),
        PROMPT,
    ),
)
