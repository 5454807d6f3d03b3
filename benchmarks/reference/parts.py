"""What a reference run trains and evaluates, a part each; every part goes on where it stopped and says whether it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.reference.picture_heads import PICTURE_HEADS, picture_head_overrides
from benchmarks.reference.shares import make_shards, sets_of
from benchmarks.reference.shop import Shop, model_figures
from benchmarks.reference.work import Work
from megamm.config import Dataset, Recipe, load_recipe, to_dict

SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
FOLDS = ("fold1", "fold2", "fold3", "fold4", "fold5")
SINGLE_SETS = ("mnist12k", "fsdd", "goemotions")
SPEAKER_RECIPE, SOUNDS_RECIPE = "reference_speaker", "reference_sounds"
SHOP = "online_retail"
_LONGEST_ANSWER = 7 / 8
"""Share of the decoder's positions that an answer may take: the outlines of a picture full of nuclei, and a question fits beside them."""
_FRAMES_A_TOKEN = 16
"""More than a sound has to a token."""
ONE_TASK = {"data.schedule": [], "loss.task_weights": {}}
"""What a recipe of all tasks loses where one is left."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a part needs to know.

    Attributes:
        work: Where everything is kept.
        data: The folder of the real data.
        recipe: Of the main model: a name or a TOML file.
    """

    work: Work
    data: Path
    recipe: str

    def load(self, recipe: str) -> Recipe:
        """A recipe on this work folder's shards."""
        return load_recipe(recipe, self.work.recipe_overrides(recipe))


def main(setting: Setting) -> bool:
    """The model of all tasks, its evaluation, and the ranking of a shop's items as its README measures it."""
    work = setting.work
    make_shards(work, setting.data, sets_of(setting.load(setting.recipe)))
    if not work.train("main", ["pretrain", setting.recipe]):
        return False
    recipe = setting.load(setting.recipe)
    longest = longest_answer(recipe)
    work.evaluate("main", *(("--max-new-tokens", str(longest)) if longest else ()))
    if SHOP in sets_of(recipe):
        shop = Shop.read(setting.data / SHOP)
        model_figures(work.run_folder("main"), work.shards / SHOP, shop, work.folder / "main" / "shop.json", share=work.quick)
    return True


def longest_answer(recipe: Recipe) -> int | None:
    """Tokens that the model of all tasks may answer with; None where the recipe does not say how many positions it has."""
    num_positions = recipe.model.text.config.get("max_position_embeddings")
    return None if num_positions is None else int(_LONGEST_ANSWER * num_positions)


def speakers(setting: Setting) -> bool:
    """Spoken digits with one speaker left out, a model each."""
    return _left_out(setting, SPEAKER_RECIPE, "fsdd_speakers", SPEAKERS)


def folds(setting: Setting) -> bool:
    """Sounds with one fold left out, a model each."""
    return _left_out(setting, SOUNDS_RECIPE, "esc10_16k", FOLDS)


def single(setting: Setting) -> bool:
    """A model of one task for three of them: the main one's size, on that task's share of the tokens."""
    work, recipe = setting.work, setting.load(setting.recipe)
    make_shards(work, setting.data, sets_of(recipe))
    # Planned lengths lie beside shards once this is there; they say how many tokens a set has.
    work.make_tokenizer(setting.recipe)
    work.run("data", "plan-lengths", setting.recipe, *work.recipe_overrides(setting.recipe))
    shares = token_shares(recipe)
    done = True
    sets = [name for name in SINGLE_SETS if name in sets_of(recipe)]
    for name in sets[:1] if work.quick else sets:
        share = sum(share for dataset, share in shares.items() if set_of(recipe, "train", dataset) == name)
        done = done and _trained_alone(setting, recipe, name, share)
    return done


def detector(setting: Setting) -> bool:
    """A detector head on the main model's vision tower."""
    return _picture_head(setting, "detector")


def segmenter(setting: Setting) -> bool:
    """A segmenter head on the main model's vision tower."""
    return _picture_head(setting, "segmenter")


PARTS: Mapping[str, Callable[[Setting], bool]] = {
    "main": main,
    "detector": detector,
    "segmenter": segmenter,
    "speakers": speakers,
    "folds": folds,
    "single": single,
}
"""Name -> part, in the order in which they run."""


def done_and_judged(setting: Setting, name: str, command: list[object], overrides: list[str]) -> bool:
    """Train a run and evaluate it; whether both are done."""
    if not setting.work.train(name, command, overrides):
        return False
    setting.work.evaluate(name)
    return True


def _picture_head(setting: Setting, name: str) -> bool:
    source = setting.work.run_folder("main")
    if not (source / "DONE").is_file():
        print(f"the {name} starts from the main model, which is not done", flush=True)
        return False
    recipe, of = setting.load(setting.recipe), PICTURE_HEADS[name]
    train = {dataset: {**table, "augment": dict(of.augment)} for dataset, table in only(recipe, "train", of.set).items()}
    data = {"data.train": train, "data.held_out": only(recipe, "held_out", of.set)}
    overrides = tables({**data, **ONE_TASK, **picture_head_overrides(recipe, name)})
    return done_and_judged(setting, name, ["finetune", source, setting.recipe], overrides)


def _left_out(setting: Setting, recipe: str, name: str, splits: tuple[str, ...]) -> bool:
    make_shards(setting.work, setting.data, [name])
    pattern = next(iter(datasets(setting.load(recipe), "train").values()))
    done = True
    for left_out in splits[:1] if setting.work.quick else splits:
        train = {split: {**pattern, "shards": f"{name}/{split}-*.tar"} for split in splits if split != left_out}
        overrides = tables({"data.train": train, "data.held_out": {left_out: {"shards": f"{name}/{left_out}-*.tar"}}})
        done = done and done_and_judged(setting, f"{name}-{left_out}", ["pretrain", recipe], overrides)
    return done


def _trained_alone(setting: Setting, recipe: Recipe, name: str, share: float) -> bool:
    steps = max(1, round(share * recipe.train.steps))
    warmup, decay = (min(steps // 4, round(share * one)) for one in (recipe.schedule.warmup_steps, recipe.schedule.decay_steps))
    data = {f"data.{part}": only(recipe, part, name) for part in ("train", "held_out")}
    length = {"train.steps": steps, "schedule.warmup_steps": warmup, "schedule.decay_steps": decay}
    overrides = tables({**data, **ONE_TASK, **room(recipe), **length})
    return done_and_judged(setting, f"single-{name}", ["pretrain", setting.recipe], overrides)


def room(recipe: Recipe) -> dict[str, int]:
    """Overrides that leave the tokens of a row its only bound: a row of one kind of media alone is else full long before its tokens are."""
    tokens = recipe.batch.row_tokens
    return {"data.row_patches": tokens * recipe.model.image_features.merge**2, "data.row_frames": tokens * _FRAMES_A_TOKEN}


def set_of(recipe: Recipe, part: str, dataset: str) -> str:
    """The set whose shards a dataset reads."""
    return Path(getattr(recipe.data, part)[dataset].shards).parts[0]


def only(recipe: Recipe, part: str, name: str) -> dict[str, Any]:
    """The datasets of a part of a recipe that read one set."""
    return {dataset: table for dataset, table in datasets(recipe, part).items() if set_of(recipe, part, dataset) == name}


def datasets(recipe: Recipe, part: str) -> dict[str, Any]:
    """The datasets of a part of a recipe as they would stand in a file: without what goes without saying."""
    default = json.loads(json.dumps(asdict(Dataset(""))))
    return {name: _changed(table, default) for name, table in to_dict(recipe)["data"][part].items()}


def _changed(table: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in table.items() if value != default[key]}
    return {key: _changed(value, default[key]) if isinstance(default[key], Mapping) else value for key, value in changed.items()}


def token_shares(recipe: Recipe) -> dict[str, float]:
    """Dataset -> its share of the tokens that a recipe draws in training; lengths must have been planned.

    Raises:
        DataError: They were not.
    """
    from megamm.data.planning.mixture import planned_weights
    from megamm.prepare.stats import recipe_stats
    from megamm.tokenizers.text import TextTokenizer

    stats = recipe_stats(recipe, TextTokenizer.load(Path(recipe.tokenizer.folder)))
    planned = {one.name: one.tokens for one in stats.datasets if one.part == "train"}
    lengths = {name: tokens.total / tokens.num for name, tokens in planned.items() if tokens is not None and tokens.num}
    names, drawn = sorted(recipe.data.train), dict.fromkeys(recipe.data.train, 0.0)
    changes = planned_weights(recipe.data)
    for change, end in zip(changes, [*(one.step for one in changes[1:]), recipe.train.steps], strict=True):
        tokens = {name: weight * lengths.get(name, 0.0) for name, weight in zip(names, change.weights, strict=True)}
        for name, num in tokens.items():
            drawn[name] += (end - change.step) * num / sum(tokens.values())
    return {name: steps / recipe.train.steps for name, steps in drawn.items()}


def tables(values: Mapping[str, Any]) -> list[str]:
    """Overrides that give keys of a recipe new values, whole tables among them."""
    return [word for key, value in values.items() for word in (f"--{key}", toml(value))]


def toml(value: Any) -> str:
    """A plain value as TOML on one line; None is left out of tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items() if one is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
