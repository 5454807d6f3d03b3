"""The table of a reference run: each figure beside its goal, the floor of the data's README and other models; what is missing says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.reference.emotions import grouped, grouped_macro_f1
from benchmarks.reference.parts import FOLDS, SHOP, SINGLE_SETS, SPEAKERS, Setting
from benchmarks.reference.shop import Shop, baselines
from benchmarks.reference.work import Work
from benchmarks.results import Row
from megamm.config import load_resolved
from megamm.core.files import read_json
from megamm.core.json_lines import read_json_lines
from megamm.core.tables import aligned
from megamm.metrics.bootstrap import interval
from megamm.metrics.label_sets import macro_f1_statistic

NOT_RUN = "not run"
_MOST_PARAMETERS, _MOST_MINUTES = 30e6, 180
_KEPT = "of an earlier work folder"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of an evaluation.

    Attributes:
        row: What it is called in the table.
        set: The set of shards that it is over.
        metric: Its name in the evaluation's report.
        goal: Of the issue; empty where the figure is reported only.
        floor: What the data's README says is to be beaten.
        factor: The report's value is multiplied by it.
        unit: Of the product.
    """

    row: str
    set: str
    metric: str
    goal: str = ""
    floor: str = ""
    factor: float = 1.0
    unit: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A mean over models that each leave one split of a set out; see `Figure`."""

    row: str
    set: str
    splits: tuple[str, ...]
    goal: str
    floor: str


FIGURES = (
    Figure("mnist: accuracy", "mnist12k", "accuracy", ">= 0.985", "XGBoost 0.958, small CNN 0.992, both on 60,000"),
    Figure("fsdd official: accuracy", "fsdd", "accuracy", ">= 0.98", "0.983"),
    Figure("esc10 fold 5, by the model of all tasks: accuracy", "esc10_16k", "accuracy", "", "0.720 over 5 folds"),
    Figure("cmn_words: character error rate", "cmn_words", "character_error_rate"),
    Figure("bccd by tokens: mAP50", "bccd_320", "map50", ">= 0.50", "YOLOv7 0.906 on another split"),
    Figure("bccd counting: exact", "bccd_320_counting", "exact_match"),
    Figure("bccd counting: mean absolute error", "bccd_320_counting", "mean_absolute_error"),
    Figure("digits scattered over a canvas, by tokens: mAP50", "digit_places", "map50"),
    Figure("nuclei by tokens: foreground IoU", "nuclei256", "foreground_iou", ">= 0.75"),
    Figure("nuclei by tokens: AP of instances", "nuclei256", "ap", "", "U-Net 0.31 mean IoU-AP on another test set"),
    Figure("flowers: accuracy", "flowers96", "accuracy", ">= 0.85"),
    Figure("emoji names: CIDEr", "noto_emoji48", "cider"),
    Figure("emoji faces: macro F1", "noto_emoji48_faces", "macro_f1"),
    Figure("is the spoken digit the pictured one: accuracy", "digit_matching", "accuracy"),
    Figure("sum of a spoken and a pictured digit: exact", "digit_sums", "exact_match"),
    Figure("goemotions, 28 emotions: macro F1", "goemotions", "macro_f1", "", "BERT-base 0.503 on the unfiltered set"),
    Figure("tatoeba, both directions: chrF", "tatoeba_en_zh", "chrf"),
    Figure(
        "shakespeare: loss a character",
        "tiny_shakespeare",
        "bits_per_byte",
        "",
        "nanoGPT 1.47 on a GPU, 1.88 in 3 minutes on a CPU",
        math.log(2),
        "nats",
    ),
    Figure("poetry: bits a byte", "chinese_poetry", "bits_per_byte"),
)
BY_HEADS = {
    "detector": (Figure("bccd by the detector head: mAP50", "bccd_320", "map50", ">= 0.50"),),
    "segmenter": (
        Figure("nuclei by the segmenter head: foreground IoU", "nuclei256", "foreground_iou", ">= 0.75"),
        Figure("nuclei by the segmenter head: AP of instances", "nuclei256", "ap"),
    ),
}
"""Part -> what its head is judged by."""
LEFT_OUT_SPEAKERS = LeftOut("fsdd, a speaker left out: mean accuracy", "fsdd_speakers", SPEAKERS, ">= 0.80", "0.632 (0.35 to 0.85)")
LEFT_OUT_FOLDS = LeftOut("esc10, 5 folds: mean accuracy", "esc10_16k", FOLDS, ">= 0.75", "0.720; random forest 0.727")
_SINGLE = tuple(figure for name in SINGLE_SETS for figure in FIGURES if figure.set == name)


@dataclass(frozen=True)
class Evaluated:
    """The report and the predictions of one evaluation; a folder without a report has no figures."""

    folder: Path

    @cached_property
    def report(self) -> dict[str, Any]:
        """The report; empty where there is none."""
        path = self.folder / "report.json"
        return read_json(path) if path.is_file() else {}

    def unfinished(self, name: str) -> int:
        """Answers of a set that the bound on their length cut off."""
        return sum(count for place, count in self.report.get("unfinished", {}).items() if place.partition("/")[0] in self._datasets(name))

    def num_skipped(self, name: str) -> int:
        """Samples of a set that could not be judged."""
        return sum(one["dataset"] in self._datasets(name) for one in self.report.get("skipped", ()))

    def row(self, name: str, metric: str) -> dict[str, Any] | None:
        """The report's row of a set and a metric over all samples; None where there is none."""
        for row in self.report.get("rows", ()):
            if row["dataset"] in self._datasets(name) and row["metric"] == metric and not row["slice"] and not row.get("change"):
                return row
        return None

    def texts(self, name: str, keys: str = "") -> tuple[list[str], list[str]]:
        """Answers and references of a set, of the samples whose keys begin so."""
        datasets = self._datasets(name)
        lines = [
            line
            for line in read_json_lines(self.folder / "predictions.jsonl")
            if line["dataset"] in datasets and line["kind"] == "answered" and line["key"].startswith(keys) and not line.get("change")
        ]
        return [line["answer"]["text"] for line in lines], [line["reference"]["text"] for line in lines]

    def _datasets(self, name: str) -> set[str]:
        patterns = self.report.get("settings", {}).get("datasets", {})
        return {dataset for dataset, pattern in patterns.items() if Path(pattern).parent.name == name}


def rows_of(setting: Setting) -> list[Row]:
    """All rows, in the order of the issue; a figure that is not there yet says `not run` and holds no goal."""
    work = setting.work
    main = Evaluated(work.report("main").parent)
    rows = [*_cost_rows(setting), *(_figure_row(main, figure) for figure in FIGURES)]
    by_name = {row.row: index for index, row in enumerate(rows)}
    more: list[tuple[str, Sequence[Row]]] = [
        ("fsdd official: accuracy", _left_out_rows(setting, LEFT_OUT_SPEAKERS)),
        ("fsdd official: accuracy", _left_out_rows(setting, LEFT_OUT_FOLDS)),
        ("bccd by tokens: mAP50", _head_rows(work, "detector")),
        ("nuclei by tokens: AP of instances", _head_rows(work, "segmenter")),
        ("goemotions, 28 emotions: macro F1", [_grouped_row(main)]),
        ("tatoeba, both directions: chrF", list(_direction_rows(main))),
        ("goemotions, 28 emotions: macro F1", _shop_rows(setting)),
    ]
    inserted: dict[int, list[Row]] = {}
    for after, added in more:
        inserted.setdefault(by_name[after], []).extend(added)
    ordered = [one for index, row in enumerate(rows) for one in (row, *inserted.get(index, ()))]
    return [*ordered, *_single_rows(setting)]


def _head_rows(work: Work, part: str) -> list[Row]:
    evaluated = Evaluated(work.report(part).parent)
    return [_figure_row(evaluated, figure) for figure in BY_HEADS[part]]


def kept(rows: Sequence[Row], table: Path) -> list[Row]:
    """Rows, where those that are not run stand as an earlier table has them, and say so.

    Args:
        rows: Of this work folder.
        table: JSON of the earlier table; where there is none, nothing is filled in.

    Raises:
        DataError: It cannot be read.
    """
    earlier = {row["row"]: row for row in read_json(table)["rows"]} if table.is_file() else {}
    filled = []
    for row in rows:
        found = earlier.get(row.row)
        if row.value != NOT_RUN or found is None or found["value"] == NOT_RUN:
            filled.append(row)
        else:
            peer = found["peer"].removesuffix(_KEPT).removesuffix("; ")
            filled.append(replace(row, value=found["value"], unit=found["unit"], peer="; ".join(filter(None, [peer, _KEPT]))))
    return filled


def show(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    holds = {None: "", True: "yes", False: "NO"}
    values = [row.value if isinstance(row.value, str) else f"{row.value:.4g}" for row in rows]
    cells = [(row.row, value, row.goal, holds[row.holds], row.peer) for row, value in zip(rows, values, strict=True)]
    return "\n".join(aligned(("figure", "value", "goal", "holds", "beside"), cells))


def _figure_row(evaluated: Evaluated, figure: Figure) -> Row:
    found = evaluated.row(figure.set, figure.metric)
    if found is None or found["value"] is None:
        return Row(figure.row, NOT_RUN, "", figure.goal, None, _beside(figure.floor))
    value = found["value"] * figure.factor
    ends = [found[end] * figure.factor for end in ("low", "high") if found[end] is not None]
    beside = _beside(figure.floor, ends, found["samples"], evaluated.unfinished(figure.set), evaluated.num_skipped(figure.set))
    guess = [] if found["chance"] is None else [f"the best guess without looking: {found['chance'] * figure.factor:.3g}"]
    return Row(figure.row, value, figure.unit, figure.goal, None, "; ".join([beside, *guess]))


def _beside(floor: str, ends: Sequence[float] = (), num_samples: int | None = None, num_unfinished: int = 0, num_skipped: int = 0) -> str:
    parts = [f"floor: {floor}"] if floor else []
    parts += [f"95 %: {ends[0]:.3g} to {ends[1]:.3g}"] if len(ends) == 2 else []
    parts += [f"{num_samples:,} samples"] if num_samples is not None else []
    parts += [f"{num_unfinished:,} answers cut off"] if num_unfinished else []
    parts += [f"{num_skipped:,} samples skipped"] if num_skipped else []
    return "; ".join(parts)


def _cost_rows(setting: Setting) -> list[Row]:
    """Size of the main model, and what its training took."""
    from megamm.train.recipes import recipe_parameters

    size, cost = "parameters of the model of all tasks", "its training"
    goals = f"<= {_MOST_PARAMETERS:g}", f"<= {_MOST_MINUTES}"
    run = setting.work.run_folder("main")
    if not (run / "DONE").is_file():
        return [Row(size, NOT_RUN, "", goals[0]), Row(cost, NOT_RUN, "minutes", goals[1])]
    recipe = load_resolved(run / "config.json")
    step, tokens = _learnt(run)
    seconds = setting.work.seconds("main")
    minutes = NOT_RUN if seconds is None else seconds / 60
    peer = f"{step:,} steps, {tokens:,} tokens, {_num_processes(run)} processes; "
    peer += "trained elsewhere" if seconds is None else "wall time with starts"
    return [Row(size, recipe_parameters(recipe)["total"], "", goals[0]), Row(cost, minutes, "minutes", goals[1], None, peer)]


def _num_processes(run: Path) -> int:
    return int(read_json(run / "environment.json")["launcher"].get("WORLD_SIZE", 1))


def _left_out_rows(setting: Setting, of: LeftOut) -> list[Row]:
    found = {split: Evaluated(setting.work.report(f"{of.set}-{split}").parent).row(of.set, "accuracy") for split in of.splits}
    values = {split: row["value"] for split, row in found.items() if row is not None}
    missing = [split for split in of.splits if split not in values]
    each = ", ".join(f"{split} {value:.3f}" for split, value in values.items())
    beside = "; ".join(filter(None, [f"floor: {of.floor}", each, f"{NOT_RUN}: {', '.join(missing)}" if missing else ""]))
    return [Row(of.row, NOT_RUN if missing else mean(values.values()), "", of.goal, None, beside)]


def _grouped_row(main: Evaluated) -> Row:
    name, goal, floor = "goemotions, 4 groups: macro F1", ">= 0.60", "BERT-base 0.701 on the unfiltered set"
    answers, references = main.texts("goemotions")
    if not answers:
        return Row(name, NOT_RUN, "", goal, None, _beside(floor))
    statistic = macro_f1_statistic(list(map(grouped, answers)), list(map(grouped, references)))
    ends = interval(statistic, len(answers))
    beside = _beside(floor, (ends.low, ends.high), len(answers))
    return Row(name, grouped_macro_f1(answers, references), "", goal, None, beside)


def _direction_rows(main: Evaluated) -> Iterator[Row]:
    from megamm.metrics.text import chrf, chrf_statistic

    for keys, what in (("en-zh", "English to Chinese"), ("zh-en", "Chinese to English")):
        answers, references = main.texts("tatoeba_en_zh", keys)
        if not answers:
            yield Row(f"tatoeba, {what}: chrF", NOT_RUN)
            continue
        wanted = [[one] for one in references]
        ends = interval(chrf_statistic(answers, wanted), len(answers))
        yield Row(f"tatoeba, {what}: chrF", chrf(answers, wanted), "", "", None, _beside("", (ends.low, ends.high), len(answers)))


def _shop_rows(setting: Setting) -> list[Row]:
    path = setting.work.folder / "main" / "shop.json"
    ours = read_json(path) if path.is_file() else None
    others = baselines(Shop.read(setting.data / SHOP))
    goals = {"recall": ("R@10", ">= 0.081"), "ndcg": ("NDCG@10", ">= 0.075"), "hit_rate": ("Hit@10", "")}
    rows = []
    for metric, (what, goal) in goals.items():
        beside = "; ".join(f"{name} {figures[metric]:.4f}" for name, figures in others.items())
        if ours:
            beside += f"; {_beside('', ours['intervals'][metric])}; {ours['customers']:,} customers"
        rows.append(Row(f"online_retail, new items: {what}", ours[metric] if ours else NOT_RUN, "", goal, None, beside))
    return rows


def _single_rows(setting: Setting) -> Iterator[Row]:
    """Models of one task beside the model of all."""
    main = Evaluated(setting.work.report("main").parent)
    ways: list[tuple[str, str, Callable[[Evaluated], Row]]] = [
        ("mnist, a model of this task alone: accuracy", "mnist12k", lambda one: _figure_row(one, _SINGLE[0])),
        ("fsdd, a model of this task alone: accuracy", "fsdd", lambda one: _figure_row(one, _SINGLE[1])),
        ("goemotions, 4 groups, a model of this task alone: macro F1", "goemotions", _grouped_row),
    ]
    for what, name, row_of in ways:
        folder = setting.work.report(f"single-{name}").parent
        row, shared = row_of(Evaluated(folder)), row_of(main)
        # Where the model of all tasks lies in another work folder, its own row says how well it does.
        beside = [] if isinstance(shared.value, str) else [f"model of all tasks: {shared.value:.4g}"]
        beside += [] if isinstance(row.value, str) else [_trained(setting, name)]
        yield Row(what, row.value, "", "", None, "; ".join(beside))


def _trained(setting: Setting, name: str) -> str:
    """What a model of one task learnt from, beside what the model of all tasks takes."""
    step, tokens = _learnt(setting.work.run_folder(f"single-{name}"))
    return f"{step:,} steps ({step / setting.load(setting.recipe).train.steps:.1%} of the model of all tasks), {tokens:,} tokens"


def _learnt(run: Path) -> tuple[int, int]:
    """Steps of a run and tokens that it took; zeros where it has not begun."""
    path = run / "metrics.jsonl"
    lines = [line for line in read_json_lines(path) if "tokens_total" in line] if path.is_file() else []
    return (lines[-1]["step"], lines[-1]["tokens_total"]) if lines else (0, 0)
