"""A run with a head: loaded, exported with the head beside the core, and merged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamm.config import Head
from megamm.core.errors import CheckpointError
from megamm.export.export import export
from megamm.inference.heads import predict
from megamm.inference.load import load_model
from megamm.tasks import template
from tests.support.shards import jpeg
from tests.support.tiny_run import write_run

HEAD = Head("detector", ("cell", "platelet"), states="vision", hidden_size=16, num_queries=9, num_layers=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder whose checkpoint holds a model and a head of random weights."""
    run = tmp_path_factory.mktemp("runs") / "headed"
    write_run(run, head=HEAD)
    return run


def samples():
    ask = [{"type": "image", "member": "0.jpg"}, {"type": "text", "text": "What digit is this?"}]
    sample = template.parse_sample(
        "k",
        {"task": "detection", "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": "nothing"}]},
        where="here",
    )
    return [replace(sample, media={"0.jpg": jpeg(20 + 4 * number, 12, seed=number)}) for number in range(3)]


def test_the_run_answers_with_its_own_weights_in_source_pixels(run):
    loaded = load_model(run, device="cpu")
    answers = predict(loaded, samples())
    assert any(answer.boxes for answer in answers)
    for number, answer in enumerate(answers):
        for box in answer.boxes:
            assert 0 <= box.xyxy[0] < box.xyxy[2] <= 20 + 4 * number and 0 <= box.xyxy[1] < box.xyxy[3] <= 12
    with torch.no_grad():
        loaded.model.head.kind.place[2].bias += 1.0
    assert predict(loaded, samples()) != answers


def test_the_head_lies_beside_a_core_that_loads_without_it(run, tmp_path):
    folder = export(run, tmp_path / "out", dtype="float32", parity=False)
    assert not any(key.startswith("head.") for key in load_file(folder / "model.safetensors"))
    assert predict(load_model(folder, device="cpu"), samples()) == predict(load_model(run, device="cpu"), samples())
    assert "| head | detector on the states of " in (folder / "README.md").read_text()
    weights = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match="holds no whole head"):
        load_model(folder)
    (folder / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no whole head"):
        load_model(folder)
    (folder / "head.json").unlink()
    assert load_model(folder, device="cpu").model.head is None


def test_a_head_of_other_settings_is_refused(run, tmp_path):
    folder = export(run, tmp_path / "out", dtype="bfloat16", parity=False)
    assert load_model(folder, device="cpu").model.head.kind.classify.weight.dtype == torch.bfloat16
    settings = (folder / "head.json").read_text()
    (folder / "head.json").write_text(settings.replace('"num_queries": 9', '"num_queries": 8'))
    with pytest.raises(CheckpointError, match=r"kind.queries.queries.weight of the head has the shape \(9, 16\), not \(8, 16\)"):
        load_model(folder)
