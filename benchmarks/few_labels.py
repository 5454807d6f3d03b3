"""What unlabelled data gains where only ten samples of each class are labelled: self-supervision, pseudo-labels, and both.

    MEGAMM_DATA=… python -m benchmarks.few_labels [--quick] [--seeds N] [--work DIR]

Every way has the same number of optimizer steps in all, of rows of the same capacity: what a way spends on filling in hidden cells, on
next tokens or on a teacher it has less for the answers. Pictures are handwritten digits, sounds spoken ones, texts comments in one of
four groups of emotions; the labelled samples are drawn by a keyed hash, another ten of each class for each seed, and all of the training
split is there without its labels. The test split is the data's own (of
the comments those that show one group).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.prepare_shared_data import DIGITS, goemotions, run
from benchmarks.reference.emotions import GROUPS, grouped
from benchmarks.results import Row, write
from benchmarks.shared_tables import jsonl
from megamm.config import load_recipe
from megamm.core.files import digest_file, digest_text, read_json, write_json
from megamm.core.types import Sample
from megamm.data.samples.mapping import OWN_FORM, read_sample
from megamm.data.shards.index import load_index
from megamm.data.shards.reader import LocalReader, ShardReader
from megamm.inference import heads
from megamm.inference.load import load_model
from megamm.labelling import pseudo_label
from megamm.metrics.bootstrap import interval, mean_of
from megamm.metrics.classes import majority_share
from megamm.prepare.tokenizer import make_tokenizer
from megamm.prepare.writer import ShardFile
from megamm.tasks.reply import stored_reply
from megamm.tasks.template import split_answer

COMMAND = "python -m benchmarks.few_labels"
NUM_A_CLASS = 10
THRESHOLD = 0.9
WAYS = ("labels alone", "self-supervised start", "pseudo-labels", "both")

_RECIPE = """
name = "few-labels"
[data]
window = 1024
[batch]
row_tokens = 512
global_rows = 4
micro_rows = 4
[optim]
lr = 1e-3
weight_decay = 0.05
[schedule]
min_ratio = 0.02
[engine]
preset = "zero1"
precision = "bf16"
activation_checkpointing = "none"
[checkpoint]
every = 0
[telemetry]
tensorboard = false
every = 20
"""
# Nobody looks at the decoder where the head looks at a tower.
_NO_TEXTS = """
[tokenizer]
text_size = 300
location_bins = 0
[model.text]
type = "qwen3"
trainable = false
config = { hidden_size = 32, intermediate_size = 32, num_hidden_layers = 1, num_attention_heads = 2, num_key_value_heads = 1, head_dim = 16, tie_word_embeddings = true }
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class Medium:
    """One kind of data.

    Attributes:
        name: For rows.
        shards: The set of `benchmarks.prepare_shared_data`, or what `make` makes.
        states: What the head of the labels looks at.
        labels: Of the classes.
        augment: Random changes of labelled samples.
        hidden: What is hidden from a self-supervised start; empty where that goes on with documents, token by token.
        recipe: Its tokenizer and towers, as TOML.
        unlabelled: What a self-supervised start learns from.
        make: Makes the shards in a folder; None for a set of `benchmarks.prepare_shared_data`.
    """

    name: str
    shards: str
    states: str
    labels: tuple[str, ...]
    augment: str
    hidden: str
    recipe: str
    unlabelled: str = "train-*.tar"
    make: Callable[[Path], None] | None = None


def comments(folder: Path) -> None:
    """Comments that show one group of emotions, with the group as their label, and the same comments as documents below `texts`."""
    with tempfile.TemporaryDirectory() as scratch:
        # Its rules of what may be held out hold here as well.
        _, table, *_ = next(goemotions(Path(os.environ["MEGAMM_DATA"]) / "goemotions", Path(scratch)))
        rows = [json.loads(line) for line in Path(str(table)).read_text(encoding="utf-8").splitlines()]
        groups = [grouped(", ".join(row["label"])) for row in rows]
        labelled = [{**row, "label": min(group)} for row, group in zip(rows, groups, strict=True) if len(group) == 1]
        documents = [{key: row[key] for key in ("text", "key", "split")} for row in labelled if row["split"] == "train"]
        run(["text", jsonl(Path(scratch) / "texts.jsonl", documents), "--output", folder / "texts"])
        asked = ("--task", "sentiment", "--prompt", "How does the writer feel?")
        # The last one: its report says that all is there.
        run(["manifest", jsonl(Path(scratch) / "groups.jsonl", labelled), *asked, "--output", folder])


MEDIA = (
    Medium(
        "pictures",
        "mnist12k",
        "vision",
        tuple(map(str, range(10))),
        "{image_shift=0.08,image_zoom=0.1,image_rotate_degrees=10.0}",
        "mask_share=0.5",
        _NO_TEXTS
        + """
[model.vision]
type = "siglip2_vision_model"
config = { hidden_size = 128, intermediate_size = 384, num_hidden_layers = 4, num_attention_heads = 4, patch_size = 7, num_patches = 16, vision_use_head = false }
[model.image_features]
patch_size = 7
max_patches = 16
""",  # noqa: E501
    ),
    Medium(
        "sounds",
        "fsdd",
        "audio",
        DIGITS,
        "{audio_gain_db=6.0,audio_noise=0.05,audio_speeds=[0.9,1.0,1.1]}",
        "mask_share=0.5,mask_span=2",
        _NO_TEXTS
        + """
[model.audio]
type = "qwen3_asr_encoder"
config = { d_model = 128, encoder_layers = 3, encoder_attention_heads = 4, encoder_ffn_dim = 384, downsample_hidden_size = 32, num_mel_bins = 40 }
[model.audio_features]
num_mel = 40
""",  # noqa: E501
    ),
    Medium(
        "texts",
        "comments",
        "decoder",
        tuple(GROUPS),
        "{}",
        "",
        """
[tokenizer]
text_size = 3000
location_bins = 0
[model.text]
type = "qwen3"
config = { hidden_size = 128, intermediate_size = 384, num_hidden_layers = 3, num_attention_heads = 4, num_key_value_heads = 2, head_dim = 32, max_position_embeddings = 1024, tie_word_embeddings = true }
""",  # noqa: E501
        unlabelled="texts/train-*.tar",
        make=comments,
    ),
)


@dataclass(frozen=True, slots=True)
class Budget:
    """Optimizer steps.

    Attributes:
        all: That every way has.
        hidden: Of which a self-supervised start takes these.
        teacher: And a teacher of pseudo-labels these.
        num_test: Test samples that are asked about; 0 for all.
    """

    all: int = 1000
    hidden: int = 600
    teacher: int = 150
    num_test: int = 0


FULL, QUICK = Budget(), Budget(all=12, hidden=4, teacher=4, num_test=100)


@dataclass(frozen=True)
class Experiment:
    """One kind of data with its shards and tokenizer below a folder, and the commands that train on it."""

    medium: Medium
    folder: Path
    budget: Budget

    def words(self, num_steps: int, datasets: Sequence[str], head: str | None) -> list[str]:
        """The recipe over some datasets, given as overrides of `data.train`, with a head or none: as the commands take it."""
        path = self.folder / "recipe.toml"
        path.write_text(_RECIPE + self.medium.recipe)
        train = [f"--data.train.{dataset}" for dataset in datasets]
        places = [f"--data.root={self.folder}", f"--tokenizer.folder={self.folder / 'tokenizer'}"]
        steps = [f"--train.steps={num_steps}", f"--schedule.warmup_steps={min(20, num_steps // 5)}"]
        return [str(path), *places, *train, *steps, *([] if head is None else [f"--model.head={head}"])]

    def train(self, run: str, num_steps: int, datasets: Sequence[str], *, head: str | None, source: str = "") -> str:
        """Train a run with a head or none, unless it is there. Returns its name."""
        path = self.folder / "runs" / run
        if not (path / "DONE").is_file():
            command = ["finetune", str(self.folder / "runs" / source)] if source else ["pretrain"]
            words = [*command, *self.words(num_steps, datasets, head), "--run", str(path)]
            if subprocess.run([sys.executable, "-m", "megamm.cli", *words], check=False, stdout=sys.stderr).returncode:
                sys.exit(f"{path} could not be trained; the reason is above")
            if not (path / "DONE").is_file():
                sys.exit(f"{path} was stopped before its end; the same command with --work goes on with it")
        return run

    def hidden(self) -> str:
        """The run that learns from all training samples without their labels; the same for all seeds."""
        medium = self.medium
        head = f'{{kind="masked",states="{medium.states}",{medium.hidden}}}' if medium.hidden else None
        return self.train("hidden", self.budget.hidden, [f'all={{shards="{medium.unlabelled}"}}'], head=head)

    def labelled(self, seed: int) -> str:
        """The dataset of a seed's labelled samples; `rest` is then there as well."""
        name = f"few-{seed}"
        path = self.folder / f"{name}-00000.tar"
        if not path.is_file():
            write_few(sorted(self.folder.glob("train-*.tar")), path, self.rest(seed), seed)
        return f'labelled={{shards="{name}-*.tar",augment={self.medium.augment}}}'

    def rest(self, seed: int) -> Path:
        """The shard of the training samples that a seed leaves without their labels."""
        return self.folder / f"rest-{seed}-00000.tar"

    def way(self, way: str, seed: int) -> tuple[str, Path | None]:
        """Train one way. Returns the run, and the folder of its pseudo-labels."""
        labelled, budget, head = self.labelled(seed), self.budget, self._labels_head
        start = self.hidden() if way in ("self-supervised start", "both") else ""
        left = budget.all - (budget.hidden if start else 0)
        name = f"{way.replace(' ', '-')}-{seed}"
        if way in ("labels alone", "self-supervised start"):
            return self.train(name, left, [labelled], head=head, source=start), None
        teacher = self.train(f"{name}-teacher", budget.teacher, [labelled], head=head, source=start)
        given = self.folder / f"given-{name}"
        if not (given / "pseudo-labels.json").is_file():
            # What a short run's teacher is sure of is nothing; its way is walked all the same.
            threshold = THRESHOLD if budget is FULL else 0.01
            pseudo_label(self.folder / "runs" / teacher, [str(self.rest(seed))], given, threshold=threshold)
        datasets = [labelled, f'given={{shards="{given.name}/train-*.tar",weight=3.0,augment={self.medium.augment}}}']
        return self.train(name, left - budget.teacher, datasets, head=head, source=start), given

    def correct(self, run: str) -> np.ndarray:
        """float64[N]: which test samples a run answers rightly."""
        path = self.folder / "runs" / run / "correct.json"
        if not path.is_file():
            samples = list(test_samples(self.test_tars, self.budget.num_test))
            replies = heads.predict(load_model(self.folder / "runs" / run), samples, batch_size=64)
            write_json(path, [reply.text == answer_of(sample) for reply, sample in zip(replies, samples, strict=True)])
        return np.array(read_json(path), dtype=np.float64)

    @property
    def test_tars(self) -> list[Path]:
        """Shards of the test split."""
        return sorted(self.folder.glob("test-*.tar"))

    @property
    def _labels_head(self) -> str:
        return f'{{kind="linear",labels={json.dumps(self.medium.labels)},states="{self.medium.states}"}}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="pictures alone and a few steps: whether it runs; no result")
    parser.add_argument("--seeds", type=int, default=2, help="draws of the labelled samples (default: 2)")
    parser.add_argument("--work", type=Path, default=None, help="keep shards and runs here, and go on with what is there")
    arguments = parser.parse_args()
    if not os.environ.get("MEGAMM_DATA"):
        sys.exit("MEGAMM_DATA is not set; point it at the folder of the real test data")
    with tempfile.TemporaryDirectory() as scratch:
        work = work_folder(arguments.work or Path(scratch), quick=arguments.quick)
        rows = measure(work, quick=arguments.quick, num_seeds=1 if arguments.quick else arguments.seeds)
    print(write("few_labels", COMMAND, rows, quick=arguments.quick).with_suffix(".md").read_text(encoding="utf-8"))


def work_folder(folder: Path, *, quick: bool) -> Path:
    """Where shards and runs lie: a quick run's, which learnt nothing, apart from those that are results."""
    return (folder / "quick" if quick else folder).resolve()


def measure(work: Path, *, quick: bool, num_seeds: int) -> list[Row]:
    """All rows.

    Args:
        work: Folder of shards and runs; what is there is not made again.
        quick: Pictures alone, a few steps.
        num_seeds: Draws of the labelled samples.
    """
    _check_made_by(work)
    rows: list[Row] = []
    for medium in MEDIA[:1] if quick else MEDIA:
        experiment = Experiment(medium, prepare_set(medium, work), QUICK if quick else FULL)
        rows += medium_rows(experiment, range(num_seeds))
    return rows


def _check_made_by(work: Path) -> None:
    """Shards, runs and answers of other settings are no part of these rows; settings are this file and what makes shards."""
    files = [Path(__file__), Path(__file__).with_name("prepare_shared_data.py"), *sorted(Path(__file__).parent.glob("shared_*.py"))]
    made_by, digest = work / "made_by.json", digest_text("".join(map(digest_file, files)))
    if made_by.is_file() and read_json(made_by)["digest"] != digest:
        sys.exit(f"{work} was made by another version of this benchmark; remove it, or name another --work")
    write_json(made_by, {"digest": digest})


def medium_rows(experiment: Experiment, seeds: Sequence[int]) -> Iterator[Row]:
    """Accuracy of each way, its gain over labels alone, and what became of pseudo-labels."""
    by_way: dict[str, np.ndarray] = {}
    name, budget = experiment.medium.name, experiment.budget
    answers = list(map(answer_of, test_samples(experiment.test_tars, budget.num_test)))
    most = majority_share(answers)
    for way in WAYS:
        runs = [experiment.way(way, seed) for seed in seeds]
        by_way[way] = np.stack([experiment.correct(run) for run, _ in runs])
        each = ", ".join(f"{one:.3f}" for one in by_way[way].mean(1))
        peer = f"{_interval(by_way[way].mean(0))}; by draw of labels: {each}; {budget.all} steps in all; most frequent class {most:.3f}"
        yield Row(f"{name}: {way}", float(by_way[way].mean()), "accuracy", peer=peer)
        for seed, (_, given) in zip(seeds, runs, strict=True):
            if given is not None:
                report = json.loads((given / "pseudo-labels.json").read_text())
                kept = f"{report['num_kept']} of {report['num_samples']}, of which {report['accuracy_kept']:.3f} are right"
                share = report["num_kept"] / report["num_samples"]
                yield Row(f"{name}: {way}, kept, draw {seed}", share, "of the unlabelled", peer=f"{kept}; all: {report['accuracy']:.3f}")
    for way in WAYS[1:]:
        gain = (by_way[way] - by_way["labels alone"]).mean(0)
        yield Row(f"{name}: {way} - labels alone", float(gain.mean()), "accuracy", peer=_interval(gain))


def prepare_set(medium: Medium, work: Path) -> Path:
    """Shards of a set through the ordinary command, and its tokenizer."""
    folder = work / medium.shards
    if not (folder / "train-report.json").is_file() and medium.make is not None:
        medium.make(folder)
    elif not (folder / "train-report.json").is_file():
        words = ["-m", "benchmarks.prepare_shared_data", "--output", str(work), "--only", medium.shards]
        subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        path, *overrides = Experiment(medium, folder, FULL).words(1, ['all={shards="train-*.tar"}'], '{kind="linear",labels=["0"]}')
        make_tokenizer(load_recipe(path, overrides))
    return folder


def write_few(tars: Sequence[Path], few: Path, rest: Path, seed: int) -> None:
    """Copy the first samples of each class, in an order that the seed and their keys decide, to `few`, and all others to `rest`."""
    found: dict[str, list[tuple[int, str, dict[str, bytes]]]] = defaultdict(list)
    with closing(LocalReader()) as reader:
        for tar in tars:
            shard = ShardReader(tar, load_index(tar), reader)
            for number in range(shard.index.num_samples):
                key = shard.index.key(number)
                answer = answer_of(read_sample(shard, number, OWN_FORM, media=False))
                found[answer].append((xxhash.xxh3_64_intdigest(key.encode(), seed), key, shard.sample(number)))
    ordered = [sorted(of_class, key=lambda one: one[:2]) for of_class in found.values()]
    # The few last: that they are there says that both are.
    for path, part in ((rest, slice(NUM_A_CLASS, None)), (few, slice(NUM_A_CLASS))):
        with ShardFile(path) as file:
            for _, key, files in sorted((one for of_class in ordered for one in of_class[part]), key=lambda one: one[:2]):
                file.add(key, files)


def test_samples(tars: Sequence[Path], num_wanted: int) -> Iterator[Sample]:
    """The first samples of some shards; all where no number is wanted."""
    left = num_wanted or sys.maxsize
    with closing(LocalReader()) as reader:
        for tar in tars:
            shard = ShardReader(tar, load_index(tar), reader)
            for number in range(min(left, shard.index.num_samples)):
                yield read_sample(shard, number, OWN_FORM)
            left -= min(left, shard.index.num_samples)


def answer_of(sample: Sample) -> str:
    """What is stored as a sample's label."""
    return stored_reply(split_answer(sample.messages)[1], {}).text.strip()


def _interval(values: np.ndarray) -> str:
    found = interval(mean_of(values), len(values))
    return f"{found.level:.0%} by test samples: {found.low:.3f} to {found.high:.3f}"


if __name__ == "__main__":
    main()
