"""The model card: what was trained, on what, how it is loaded, and how the export was proven."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megamm import __version__
from megamm.config import Recipe
from megamm.inference.load import Loaded

_LOAD = """```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

folder = "."  # this folder
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
chat = [{"role": "user", "content": [%s{"type": "text", "text": "What is this?"}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""


def model_card(loaded: Loaded, num_parameters: Mapping[str, int]) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads.

    Args:
        loaded: A run's model.
        num_parameters: Of the whole (`total`) and of each part.
    """
    recipe = loaded.recipe
    assert recipe is not None, "only a run has a recipe"
    parts = [("Parameters", ""), *((name.replace("_", " "), f"{count:,}") for name, count in num_parameters.items())]
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: any-to-any\ntags: [megamm]\n---",
        f"# {recipe.name}",
        f"{recipe.description or 'A composed multimodal model'}. Trained for {loaded.step:,} steps with megamm {__version__}.",
        "## How is it loaded?",
        _LOAD % _example_media(loaded),
        "The modelling code lies in this folder; nothing but transformers and torch is imported.",
        "## What is inside?",
        _table([("part", "parameters"), *parts[1:]]),
        "## How was it trained?",
        _table([("setting", "value"), *_settings(recipe)]),
        "## On what data?",
        _table([("dataset", "weight or use"), *_datasets(recipe)]),
        "## Is it the model that was trained?",
        "`parity.json` compares its logits with those of the training checkpoint, measured in a fresh process.",
    ]
    return "\n\n".join(sections) + "\n"


def _example_media(loaded: Loaded) -> str:
    if loaded.config.vision_config is not None:
        return '{"type": "image", "image": "picture.png"}, '
    if loaded.config.audio_config is not None:
        return '{"type": "audio", "audio": "sound.wav"}, '
    return ""


def _settings(recipe: Recipe) -> list[tuple[str, str]]:
    towers = {"text": recipe.model.text, "vision": recipe.model.vision, "audio": recipe.model.audio}
    batch, optim, schedule = recipe.batch, recipe.optim, recipe.schedule
    rows = [
        (f"{name} tower", f"{tower.type}{'' if tower.trainable else ', frozen'}{f', from {tower.pretrained}' if tower.pretrained else ''}")
        for name, tower in towers.items()
        if tower is not None
    ]
    if recipe.adapter.method != "none":
        where = "the decoder" if recipe.adapter.method == "prefix" else ", ".join(recipe.adapter.targets)
        rows.append(("adapter", f"{recipe.adapter.method} on {where}{', all else frozen' if recipe.adapter.freezes_base else ''}"))
    if (head := recipe.model.head) is not None:
        labels = f", {len(head.labels)} labels" if head.labels else ""
        rows.append(
            ("head", f"{head.kind} on the states of {head.states}{labels}; in head.safetensors, megamm evaluate and predict ask it")
        )
    rows += [
        ("steps", f"{recipe.train.steps:,}"),
        ("global batch", f"{batch.global_rows} rows of {batch.row_tokens:,} tokens"),
        ("optimizer", f"AdamW, lr {optim.lr:g}, betas {optim.beta1:g} and {optim.beta2:g}, weight decay {optim.weight_decay:g}"),
        ("gradient clipping", f"{optim.max_grad_norm:g}"),
        ("schedule", f"{schedule.kind}, {schedule.warmup_steps:,} warm-up steps, down to {schedule.min_ratio:g} of the peak"),
        ("precision", f"{recipe.engine.precision}, float32 master weights"),
        ("loss weights", json.dumps(recipe.loss.task_weights, sort_keys=True) if recipe.loss.task_weights else "1 for every task"),
        ("seeds", f"data {recipe.seed}, weights {recipe.engine.seed}"),
    ]
    return rows


def _datasets(recipe: Recipe) -> list[tuple[str, str]]:
    return [(name, f"{dataset.weight:g}") for name, dataset in recipe.data.train.items()] + [
        (name, "held out") for name in recipe.data.held_out
    ]


def _table(rows: list[tuple[Any, Any]]) -> str:
    head, *body = [f"| {first} | {second} |" for first, second in rows]
    return "\n".join([head, "|---|---|", *body])
