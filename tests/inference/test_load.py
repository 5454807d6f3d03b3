import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm.core.errors import CheckpointError, ConfigError
from megamm.core.files import read_json, write_json
from megamm.inference import load_model
from tests.support.tiny_run import archive, random_model, recipe, write_run


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_a_run_gives_back_the_weights_of_its_newest_checkpoint(run):
    write_run(run, step=2, seed=1)
    trained = write_run(run, step=3, seed=2)
    loaded = load_model(run)
    assert loaded.step == 3
    assert loaded.source == run / "checkpoints" / "step_00000003"
    assert loaded.recipe == recipe()
    assert not loaded.model.training
    expected = trained.model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    # What is computed and not stored: rotary frequencies and sinusoids.
    for (name, value), (_, wanted) in zip(loaded.model.named_buffers(), trained.model.named_buffers(), strict=True):
        assert torch.equal(value, wanted), name
    assert loaded.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert loaded.media == trained.media


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_have_the_type_that_training_computed_in(run, precision, dtype):
    trained = write_run(run, precision=precision)
    loaded = load_model(run)
    assert loaded.model.dtype == dtype
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, trained.model.get_parameter(name).to(dtype)), name
    assert load_model(run, dtype=torch.float32).model.dtype == torch.float32


def test_tied_weights_are_one_tensor_and_untied_ones_two(tmp_path):
    write_run(tmp_path / "tied")
    model = load_model(tmp_path / "tied").model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    untied = write_run(tmp_path / "untied", tie_word_embeddings=False)
    model = load_model(tmp_path / "untied").model
    assert torch.equal(model.lm_head.weight, untied.model.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)


def test_stored_buffers_of_a_convolutional_tower_come_back_in_full_precision(run):
    trained = write_run(run, precision="bf16", vision="resnet")
    statistics = [name for name, _ in trained.model.named_buffers() if name.endswith("running_var")]
    assert statistics
    loaded = load_model(run)
    assert loaded.model.dtype == torch.bfloat16
    for name in statistics:
        assert torch.equal(loaded.model.get_buffer(name), trained.model.get_buffer(name))
        assert loaded.model.get_buffer(name).dtype == torch.float32


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(run, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megamm"), "propagate", True)
    older = write_run(run, step=2, seed=1)
    write_run(run, step=3, seed=2)
    _flip_a_byte(run / "checkpoints" / "step_00000003" / "rank_00001.safetensors")
    loaded = load_model(run)
    assert loaded.step == 2
    name = "model.language_model.norm.weight"
    assert torch.equal(loaded.model.get_parameter(name), older.model.get_parameter(name))
    assert "step_00000003: rank_00001.safetensors is damaged" in caplog.text


def test_a_run_whose_only_checkpoint_is_damaged_is_refused(run):
    write_run(run)
    _flip_a_byte(run / "checkpoints" / "step_00000003" / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"no good checkpoint; the newest: .*rank_00000.safetensors is damaged"):
        load_model(run)


def test_a_run_without_a_checkpoint_is_refused(run):
    archive(run, recipe())
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model(run)


@pytest.mark.parametrize("name", ["step_00000002", "step_00000003", "latest"])
def test_a_checkpoint_that_is_named_stands_for_its_run(run, name, monkeypatch):
    trained = {step: write_run(run, step=step, seed=step).model for step in (2, 3)}
    (run / "checkpoints" / "latest").symlink_to("step_00000002")
    monkeypatch.chdir(run / "checkpoints")
    step = 3 if name.endswith("3") else 2
    for source in (run / "checkpoints" / name, Path(name)):
        loaded = load_model(source)
        assert (loaded.step, loaded.recipe) == (step, recipe())
        assert loaded.source == run / "checkpoints" / f"step_0000000{step}"
        assert all(torch.equal(value, trained[step].get_parameter(key)) for key, value in loaded.model.named_parameters())


def test_a_checkpoint_that_is_named_is_not_passed_over(run, tmp_path):
    for step in (2, 3):
        write_run(run, step=step)
    newest = run / "checkpoints" / "step_00000003"
    shutil.copytree(newest, tmp_path / "copied")
    with pytest.raises(ConfigError, match=r"copied lies outside its run.*put it back into RUN/checkpoints"):
        load_model(tmp_path / "copied")
    _flip_a_byte(newest / "rank_00001.safetensors")
    with pytest.raises(CheckpointError, match=r"step_00000003: rank_00001.safetensors is damaged"):
        load_model(newest)
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="it was never committed"):
        load_model(newest)
    with pytest.raises(CheckpointError, match="step_00000004 does not exist"):
        load_model(newest.with_name("step_00000004"))


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}, {"vision": ""}, {"hidden_size": 64}, {"num_hidden_layers": 3}])
def test_a_checkpoint_of_another_model_is_refused(run, changes):
    write_run(run)
    archive(run, recipe(**changes))
    with pytest.raises(
        CheckpointError, match=r"does not hold the model that its config.json describes: (missing|unexpected|mismatched) keys"
    ):
        load_model(run)


@pytest.mark.parametrize("text", [None, "not json", "[]", '{"model_type": "qwen3"}', '{"name": "half a recipe"}'])
def test_a_folder_that_is_neither_run_nor_export_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        load_model(tmp_path)


def test_an_exported_folder_needs_no_recipe(tmp_path):
    folder = tmp_path / "folder"
    trained = random_model(tmp_path)
    _export(trained, folder)
    loaded = load_model(folder)
    assert (loaded.recipe, loaded.step) == (None, None)
    for name, value in trained.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), value), name
    assert loaded.media == trained.media


def test_a_damaged_exported_folder_is_refused(tmp_path):
    folder = tmp_path / "folder"
    _export(random_model(tmp_path), folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="damaged weights"):
        load_model(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys model\.language_model\.norm\.weight"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="lacks its weights"):
        load_model(folder)
    table = read_json(folder / "config.json")
    write_json(folder / "config.json", table | {"text_config": {"model_type": "no such model"}})
    with pytest.raises(ConfigError, match="not a usable configuration"):
        load_model(folder)
    (folder / "vocabulary.json").unlink()
    write_json(folder / "config.json", table)
    with pytest.raises(ConfigError, match=r"lacks vocabulary\.json"):
        load_model(folder)


def _export(loaded, folder):
    loaded.model.save_pretrained(folder)
    for path in (loaded.source / "tokenizer").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "megamm"


def _flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
