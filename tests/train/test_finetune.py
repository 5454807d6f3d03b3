"""`megamm finetune` through the launcher: what a run starts from, what its checkpoints hold, and how it is resumed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from megamm.checkpoint.consolidate import consolidate
from megamm.checkpoint.manifest import check_base, read_data_state, read_manifest, verify
from megamm.checkpoint.reshard import reshard
from megamm.config import to_dict
from megamm.core.errors import CheckpointError, ConfigError
from megamm.core.files import read_json
from megamm.core.json_lines import read_json_lines
from megamm.export import export
from megamm.inference.load import load_model, run_config
from megamm.models.adapters import is_adapter
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.tokenizers import text
from megamm.tokenizers.text import TextTokenizer
from megamm.train.origin import find_origin, load_origin
from megamm.train.run_folder import RunFolder
from tests.support.checkpoints import whole_state
from tests.support.commands import run_commands
from tests.support.recipes import write_recipe
from tests.support.runs import make_data, recipe_over

CHECKOUT = Path(__file__).resolve().parents[2]
LORA = (
    "--adapter.method=lora",
    '--adapter.targets=["text.*", "vision.fc?", "audio.*", "projector.*"]',
    "--adapter.rank=2",
    "--checkpoint.every=2",
)

BASE = "base/checkpoints/step_00000003"
# Besides LoRA: what a run starts from, and how it is tuned.
WAYS = {
    "dora": (BASE, "--adapter.method=dora", *LORA[1:3]),
    "adalora": (
        BASE,
        "--adapter.method=adalora",
        "--adapter.budget={initial_rank=3,warmup_steps=1,final_steps=1}",
        *LORA[1:3],
    ),
    "prefix": (BASE, "--adapter.method=prefix", "--adapter.prefix_tokens=3"),
    "bottleneck": (BASE, "--adapter.method=bottleneck", '--adapter.targets=["text.*","vision.*","audio.*"]', "--adapter.bottleneck_size=5"),
    "full": ("copy", "--model.vision.pretrained=tower", "--model.vision.trainable=false"),
}

pytestmark = [pytest.mark.distributed, pytest.mark.integration, pytest.mark.timeout(900)]


def launch(folder: Path, num_ranks: int, *words: str, code: int = 0) -> str:
    """One command on ranks, from the folder of the recipe; what it said on standard error."""
    command = [str(CHECKOUT / "launchers" / "local.sh"), str(num_ranks), "megamm", *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=580)
    assert (result.returncode == 0) == (code == 0), result.stderr[-4000:]
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of 3 steps on one rank, and a LoRA run of 4 steps from it on two."""
    folder = tmp_path_factory.mktemp("finetune")
    make_data(folder / "data", num_each=12)
    write_recipe(folder / "recipe.toml", to_dict(recipe_over(folder / "data", "--checkpoint.keep_last=5", "--optim.lr=0.01")))
    launch(folder, 1, "pretrain", "recipe.toml", "--run", "base", "--train.steps=5", "--stop-after", "3")
    launch(folder, 2, "finetune", "base", "recipe.toml", "--run", "lora", "--train.steps=4", *LORA)
    return folder


def test_it_starts_from_the_base_and_says_so(folder):
    base = folder / "base" / "checkpoints" / "step_00000003"
    origin = json.loads((folder / "lora" / "origin.json").read_text())
    assert (origin["source"], origin["path"], origin["step"]) == (str(folder / "base"), str(base), 3)
    manifest = read_manifest(folder / "lora" / "checkpoints" / "step_00000004")
    assert manifest.base is not None and manifest.base.digest == origin["digest"]
    # What was learned already is there: a model of random weights begins at the logarithm of its vocabulary.
    losses = [[line["loss"] for line in read_json_lines(folder / run / "metrics.jsonl") if "loss" in line] for run in ("base", "lora")]
    assert losses[1][0] < losses[0][0] - 0.3


def test_checkpoints_hold_the_adapter_alone_and_give_the_whole_model(folder):
    lora, base = folder / "lora" / "checkpoints" / "step_00000004", folder / "base" / "checkpoints" / "step_00000003"
    names = {key.partition("/")[2] for key, _ in whole_state(lora) if not key.startswith("buffer/")}
    assert names and all(map(is_adapter, names))
    assert (
        sum(one.num_bytes for one in read_manifest(lora).files.values())
        < sum(one.num_bytes for one in read_manifest(base).files.values()) / 2
    )
    whole, old = dict(consolidate(lora)), dict(consolidate(base))
    assert whole.keys() - old.keys() == names and all(torch.equal(whole[name], old[name]) for name in old)
    assert any(whole[name].any() for name in names if name.endswith("lora_B"))


def test_a_resume_goes_on_bit_for_bit_although_its_source_went_on(folder):
    words = ("finetune", "base", "recipe.toml", "--run", "halves", "--train.steps=4", *LORA)
    launch(folder, 2, *words, "--stop-after", "2")
    # A resume must not start from the later checkpoint that the base has by then.
    launch(folder, 1, "pretrain", "recipe.toml", "--run", "base", "--train.steps=5")
    launch(folder, 2, *words)
    for step in (2, 4):
        ours, theirs = (dict(whole_state(folder / run / "checkpoints" / f"step_{step:08d}")) for run in ("halves", "lora"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def tuned(folder):
    """By every other way to tune: a run of 4 steps (`dora`), and one in halves (`dora_halves`), on two ranks."""
    recipe = recipe_over(folder / "data")
    config = run_config(recipe, TextTokenizer.load(folder / "data" / "tokenizer").vocabulary)
    AutoModel.from_config(config.vision_config).save_pretrained(folder / "tower")
    shutil.copytree(folder / "base", folder / "copy")
    common = ("--train.steps=4", "--checkpoint.every=2", "--telemetry.tensorboard=false", "--run")
    words = {name: ("finetune", source, "recipe.toml", *overrides, *common) for name, (source, *overrides) in WAYS.items()}
    halves = {name: (*words[name], f"{name}_halves") for name in WAYS}
    run_commands(folder, 2, [one for name in WAYS for one in ((*words[name], name), (*halves[name], "--stop-after", "2"))])
    # Who saves all weights needs the source no more, and no tower's folder but for its config.json.
    shutil.rmtree(folder / "copy")
    (folder / "tower" / "model.safetensors").rename(folder / "tower.safetensors")
    run_commands(folder, 2, list(halves.values()))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_goes_on_bit_for_bit(tuned, way):
    for step in (2, 4):
        ours, theirs = (tuned / run / "checkpoints" / f"step_{step:08d}" for run in (f"{way}_halves", way))
        assert read_data_state(ours).get("ranks") == read_data_state(theirs).get("ranks")
        ours, theirs = dict(whole_state(ours)), dict(whole_state(theirs))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("way", [name for name in WAYS if name != "full"])
def test_checkpoints_of_every_adapter_hold_it_alone(tuned, way):
    early, late = (tuned / way / "checkpoints" / f"step_{step:08d}" for step in (2, 4))
    names = {key.partition("/")[2] for key, _ in whole_state(late) if not key.startswith("buffer/")}
    assert names and all(map(is_adapter, names))
    before, after, base = dict(consolidate(early)), dict(consolidate(late)), dict(consolidate(tuned / BASE))
    assert after.keys() - base.keys() == names and all(torch.equal(after[name], base[name]) for name in base)
    assert any(not torch.equal(after[name], before[name]) for name in names)


def test_ranks_are_shared_out_until_the_budget_is_met(tuned):
    told = [line["adapter/mean_rank"] for line in read_json_lines(tuned / "adalora" / "metrics.jsonl") if "loss" in line]
    assert told[0] == 3.0 and told[-1] <= 2.0


def test_a_whole_model_outlives_its_source_and_has_the_tower_of_another_folder(tuned):
    """The tower is frozen, so that it can be told at the end; all else goes on from the source and trains."""
    run = tuned / "full_halves"
    origin = read_json(run / "origin.json")
    assert (origin["source"], origin["towers"]) == (str(tuned / "copy"), ["vision"]) and not Path(origin["source"]).exists()
    assert (run / "DONE").is_file() and read_manifest(run / "checkpoints" / "step_00000004").base is None
    after, base = dict(consolidate(run / "checkpoints" / "step_00000004")), dict(consolidate(tuned / BASE))
    assert after.keys() == base.keys()
    for name, value in load_file(tuned / "tower.safetensors").items():
        # Weights start rounded to what training computes in.
        assert torch.equal(after[f"model.vision_tower.{name}"].bfloat16(), value.bfloat16()), name
    losses = [
        [line["loss"] for line in read_json_lines(tuned / name / "metrics.jsonl") if "loss" in line] for name in ("base", "full_halves")
    ]
    assert losses[1][0] < losses[0][0] - 0.3


def test_another_number_of_ranks_keeps_the_base(folder, tmp_path):
    lora = folder / "lora" / "checkpoints" / "step_00000004"
    other = reshard(lora, tmp_path / "checkpoints", 3)
    ours, theirs = dict(whole_state(other)), dict(whole_state(lora))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_manifest(other).base == read_manifest(lora).base


def test_it_answers_as_a_model_with_its_adapter(folder):
    loaded = load_model(folder / "lora", device="cpu")
    assert loaded.config.adapter["method"] == "lora" and loaded.step == 4
    with torch.no_grad():
        logits = loaded.model(torch.arange(9)[None]).logits
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.zero_()
        assert not torch.equal(loaded.model(torch.arange(9)[None]).logits, logits)


def test_a_folder_that_is_nothing_to_start_from_is_one_line(folder):
    (told,) = [line for line in launch(folder, 1, "finetune", "data", "recipe.toml", "--run", "new", code=1).splitlines() if line]
    assert told == "megamm: data is nothing to start from: it is no run, no checkpoint and no folder that `megamm export` wrote"
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("source", "run", "overrides", "message"),
    [
        (None, "lora", LORA, "resume it with `megamm finetune"),
        ("lora", "lora", LORA, "holds other weights"),
        ("base", "base", (), "did not start from"),
        ("base", "new", ("--model.text.config.rope_theta=500.0",), "is of another model than the recipe's: text_config.rope"),
        ("base", "new", ("--model.vision.config.num_hidden_layers=2",), "vision_config.num_hidden_layers"),
    ],
)
def test_what_does_not_fit_is_refused(folder, world, source, run, overrides, message):
    recipe = recipe_over(folder / "data", *overrides)
    tokenizer = TextTokenizer.load(folder / "data" / "tokenizer")
    with pytest.raises(ConfigError, match=re.escape(message)):
        find_origin(source and folder / source, RunFolder(folder / run), recipe, tokenizer, world)


def test_another_tokenizer_and_another_adapter_are_refused(folder, world, tmp_path):
    recipe = recipe_over(folder / "data")
    tokenizer = TextTokenizer.load(folder / "data" / "tokenizer")
    other = text.train(["other words", "than those"] * 40, recipe.tokenizer, tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"set tokenizer.folder to .*base/tokenizer"):
        find_origin(folder / "base", RunFolder(folder / "new"), recipe, other, world)
    origin = find_origin(folder / "lora", RunFolder(folder / "new"), recipe, tokenizer, world)
    model = MegaMMForConditionalGeneration(run_config(recipe, tokenizer.vocabulary))
    with pytest.raises(ConfigError, match=r"holds an adapter that the recipe's \[adapter\] does not have"):
        load_origin(model, origin)


def test_an_adapter_of_the_same_shapes_and_other_arithmetic_is_refused(folder, world):
    """Its change would be multiplied by four, without a word."""
    recipe = recipe_over(folder / "data", *LORA, "--adapter.alpha=64.0")
    tokenizer = TextTokenizer.load(folder / "data" / "tokenizer")
    with pytest.raises(ConfigError, match="holds an adapter with another alpha"):
        find_origin(folder / "lora", RunFolder(folder / "new"), recipe, tokenizer, world)


def test_an_adapter_trains_on_from_an_adapter(folder, world):
    recipe = recipe_over(folder / "data", *LORA)
    tokenizer = TextTokenizer.load(folder / "data" / "tokenizer")
    origin = find_origin(folder / "lora", RunFolder(folder / "new"), recipe, tokenizer, world)
    model = MegaMMForConditionalGeneration(run_config(recipe, tokenizer.vocabulary))
    load_origin(model, origin)
    whole = dict(consolidate(folder / "lora" / "checkpoints" / "step_00000004"))
    assert all(torch.equal(value, whole[name]) for name, value in model.named_parameters())


def test_an_exported_folder_of_many_files_is_a_start_as_well(folder, world):
    recipe = recipe_over(folder / "data", *LORA)
    tokenizer = TextTokenizer.load(folder / "data" / "tokenizer")
    exported = export(folder / "base", folder / "exported", dtype="float32", max_shard_size="40KB", parity=False)
    assert len(list(exported.glob("model-*.safetensors"))) > 2
    origin = find_origin(exported, RunFolder(folder / "new"), recipe, tokenizer, world)
    assert (origin.base.path, origin.base.step) == (str(exported), None)
    model = MegaMMForConditionalGeneration(run_config(recipe, tokenizer.vocabulary))
    filled = load_origin(model, origin)
    names = {name for name, _ in model.named_parameters() if not is_adapter(name)}
    trained = load_model(folder / "base", dtype=torch.float32, device="cpu").model.state_dict()
    assert filled >= names and all(torch.equal(value, trained[name]) for name, value in model.named_parameters() if name in names)
    check_base(origin.base)
    shard = next(exported.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="holds other weights"):
        check_base(origin.base)


def test_a_base_that_is_gone_is_named(folder, tmp_path):
    checkpoint = folder / "lora" / "checkpoints" / "step_00000004"
    base = folder / "base"
    base.rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(CheckpointError, match=r"step_00000003, whose weights this checkpoint stands on, is not there; put it back"):
            verify(checkpoint)
    finally:
        (tmp_path / "elsewhere").rename(base)


def test_a_base_that_changed_is_found(folder):
    shard = folder / "base" / "checkpoints" / "step_00000003" / "rank_00000.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged"):
            verify(folder / "lora" / "checkpoints" / "step_00000004")
    finally:
        shard.write_bytes(data)
