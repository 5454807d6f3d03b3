"""What the drills train: a mixture of pictures and texts in packed rows, with rotten pictures in it, in a tenth of a second a step."""

from __future__ import annotations

from pathlib import Path

from megamm.config import from_dict, to_dict
from tests.support.recipes import write_recipe
from tests.support.runs import corrupt_pictures, make_data, recipe_over

DATA, RECIPE = "data", "recipe.toml"
PICTURES = "pictures/train-00000.tar"
_DECODER = (
    "{hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=4,num_key_value_heads=2,head_dim=8,"
    "tie_word_embeddings=true}"
)
_SETTINGS = (
    f"--model.text.config={_DECODER}",
    "--batch.global_rows=6",
    "--batch.micro_rows=3",
    "--data.train.pictures.weight=2",
    # Norms and biases stay whole on every rank, matrices are split: both kinds are saved and restored.
    "--engine.overrides.zero_optimization.stage3_param_persistence_threshold=100",
    "--schedule.kind=constant",
    "--telemetry.tensorboard=false",
)


def write(folder: Path) -> None:
    """Make shards of which every fourth picture is rotten, a tokenizer, and the recipe over them, with no path of this machine in it."""
    make_data(folder / DATA, num_each=40)
    corrupt_pictures(folder / DATA / PICTURES)
    table = to_dict(recipe_over(Path(DATA), *_SETTINGS))
    # Two modalities mix as three do, and the third takes as long as both.
    table["model"]["audio"] = None
    for name in ("sounds", "both"):
        del table["data"]["train"][name]
    from_dict(table)
    write_recipe(folder / RECIPE, table)
