"""A tiny trained run and the model in it: the archive that `megamm pretrain` leaves, written by the real engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megamm.checkpoint.commit import Progress
from megamm.config import Engine, Head, Recipe, Tokenizer, load_resolved, to_dict
from megamm.config.schema import Training
from megamm.core.files import write_json
from megamm.data.media.features import MediaRules
from megamm.engine import distributed, runtime, settings, weights
from megamm.export.probes import make_probes
from megamm.inference.load import Loaded, run_config
from megamm.inference.prompt import left_padded, make_prompt
from megamm.models.build import parameter_groups
from megamm.models.heads.head import BackboneHead
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.tokenizers import text
from megamm.tokenizers.text import TextTokenizer
from tests.support.checkpoints import save, write_checkpoint
from tests.support.models import NOTHING_STAYS_GATHERED
from tests.support.multimodal import tiny_recipe

SENTENCES = [
    f"What digit is this? It is the number {name}; 1 + 2 = 3, say {name} again." for name in ("zero", "one", "two", "three", "four")
]
TOKENIZER = Tokenizer(text_size=320, location_bins=4)
ENGINE_LOGITS = "engine_logits.safetensors"


def recipe(*, precision: str = "fp32", **model: Any) -> Recipe:
    """A recipe over `tests.support.multimodal`'s tiny model; `model` changes that."""
    engine = Engine(precision=precision, overrides=NOTHING_STAYS_GATHERED)  # type: ignore[arg-type]
    return Recipe(name="tiny-test", model=tiny_recipe(**model), tokenizer=TOKENIZER, engine=engine, train=Training(steps=3))


def tokenizer(folder: Path) -> TextTokenizer:
    """A tokenizer trained on a few sentences."""
    return text.train(SENTENCES * 4, TOKENIZER, folder)


def random_model(folder: Path, *, seed: int = 0, pieces: TextTokenizer | None = None, **model: Any) -> Loaded:
    """A model of random weights, in fp32, large enough that answers differ between prompts."""
    one = recipe(**model)
    pieces = tokenizer(folder / "tokenizer") if pieces is None else pieces
    torch.manual_seed(seed)
    network = MegaMMForConditionalGeneration(run_config(one, pieces.vocabulary)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return Loaded(model=network, tokenizer=pieces, media=MediaRules.of(one.model, one.data), recipe=one, step=None, source=folder)


def archive(run: Path, one: Recipe) -> None:
    """What a run folder holds beside its checkpoints."""
    if not (run / "tokenizer").exists():
        tokenizer(run / "tokenizer")
    write_json(run / "config.json", to_dict(one))


def write_run(
    run: Path,
    *,
    step: int = 3,
    seed: int = 0,
    precision: str = "fp32",
    head: Head | None = None,
    pieces: TextTokenizer | None = None,
    **model: Any,
) -> Loaded:
    """A run folder whose checkpoint holds the weights of a random model, in the real format, without an engine.

    `pieces` is another tokenizer than `tokenizer`'s and lies in the run's own folder `tokenizer`.
    """
    loaded = random_model(run, seed=seed, pieces=pieces, **model)
    one = recipe(precision=precision, **model)
    archive(run, replace(one, model=replace(one.model, head=head)))
    if head is not None:
        loaded.model.head = BackboneHead(head, loaded.config)
    network = loaded.model
    # A checkpoint holds what state_dict does, tied weights under their first name.
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    buffers = {name: value for name, value in network.state_dict().items() if name in dict(network.named_buffers())}
    fingerprints = {"tokenizer": loaded.tokenizer.fingerprint}
    write_checkpoint(run / "checkpoints", step, parameters, buffers=buffers, fingerprints=fingerprints)
    return loaded


def train_on_ranks(run_name: str) -> None:
    """Train the archived run for three real ZeRO-3 steps, commit, and keep the engine's logits on the probes of a parity report."""
    run = Path(run_name)
    world = distributed.start()
    one = load_resolved(run / "config.json")
    pieces = TextTokenizer.load(run / "tokenizer")
    config = run_config(one, pieces.vocabulary)
    ds_config = settings.deepspeed_config(one.engine, batch=one.batch, optim=one.optim, world_size=world.size, accumulation=1)
    model = weights.partitioned(lambda: MegaMMForConditionalGeneration(config), ds_config, seed=3)
    model.run_every_tower = True
    groups = [{key: value for key, value in group.items() if key != "name"} for group in parameter_groups(model, one.model, one.optim)]
    engine = runtime.initialize(model.train(), ds_config, groups, lambda step: 10.0)
    loaded = Loaded(model=model, tokenizer=pieces, media=MediaRules.of(one.model, one.data), recipe=one, step=None, source=run)
    inputs = [training_inputs(loaded, probe) for probe in make_probes(config)]
    for _ in range(one.train.steps):
        labels = inputs[-1]["input_ids"].roll(-1, 1)
        loss = engine(**inputs[-1], labels=labels).loss
        engine.backward(loss, 1 / (labels.numel() * world.size))
        engine.step()
    save(run / "checkpoints", engine, world, Progress(step=one.train.steps))
    with engine.evaluating():
        logits = {probe.name: engine(**own).logits[0].float() for probe, own in zip(make_probes(config), inputs, strict=True)}
    if world.is_main:
        save_file(logits, run / ENGINE_LOGITS)


def training_inputs(loaded: Loaded, probe: Any) -> dict[str, Any]:
    """A probe as the training forward takes it: a packed row of one document."""
    inputs = left_padded([make_prompt(loaded, [probe.message], probe.media)], loaded.config.pad_token_id, torch.device("cpu"))
    num_tokens = inputs["input_ids"].shape[1]
    del inputs["attention_mask"]
    return inputs | {"document_lengths": [[num_tokens]], "position_ids": torch.arange(num_tokens)[None], "use_cache": False}
