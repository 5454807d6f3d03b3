"""The table of shipped recipes."""

from __future__ import annotations

from pathlib import Path

from megamm.config import Recipe, load_recipe, recipe_names
from megamm.core.files import read_json
from megamm.core.tables import aligned
from megamm.inference.load import run_config
from megamm.models.build import num_parameters
from megamm.tokenizers.vocabulary import Vocabulary

_PARTS = (("decoder", "language_model"), ("vision", "vision_tower"), ("audio", "audio_tower"))


def recipe_table() -> str:
    """One line a recipe: parameters (counted on the meta device, tied weights once), batch and description."""
    header = ("recipe", "parameters", "decoder", "vision", "audio", "tokens a step", "steps", "description")
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        counts = num_parameters(run_config(recipe, Vocabulary.from_config(recipe.tokenizer, recipe.tokenizer.text_size)))
        parts = [_short(counts[part]) if part in counts else "-" for _, part in _PARTS]
        tokens = recipe.batch.row_tokens * recipe.batch.global_rows
        rows.append((name, _short(counts["total"]), *parts, f"{tokens:,}", f"{recipe.train.steps:,}", recipe.description))
    return "\n".join(aligned(header, rows))


def recipe_parameters(recipe: Recipe) -> dict[str, int]:
    """Parameters of one recipe by part, their `total` (tied weights once) and how many are `frozen`.

    Counted over the recipe's tokenizer where it was made already, else over the vocabulary that it asks for.
    """
    path = Path(recipe.tokenizer.folder) / "vocabulary.json"
    if path.is_file():
        vocabulary = Vocabulary.from_json(read_json(path))
    else:
        vocabulary = Vocabulary.from_config(recipe.tokenizer, recipe.tokenizer.text_size)
    counts = num_parameters(run_config(recipe, vocabulary))
    towers = (("language_model", recipe.model.text), ("vision_tower", recipe.model.vision), ("audio_tower", recipe.model.audio))
    if recipe.adapter.freezes_base:
        return counts | {"frozen": counts["total"] - counts["adapter"]}
    return counts | {"frozen": sum(counts[name] for name, tower in towers if tower is not None and not tower.trainable)}


def _short(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
