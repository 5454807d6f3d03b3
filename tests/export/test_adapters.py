"""Runs with adapters become folders: as they are, merged, and as peft keeps adapters."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm.config import Adapter, Head, to_dict
from megamm.config.schema import RankBudget
from megamm.core.errors import ExportError
from megamm.core.files import read_json, write_json
from megamm.export import export, export_peft
from megamm.export.merge import MAX_SHARE
from megamm.export.peft_folder import write_peft_folder
from megamm.export.probes import make_probes
from megamm.inference import load_model
from megamm.inference.load import run_config
from megamm.inference.prompt import left_padded, make_prompt
from megamm.models.adapters import is_adapter, low_rank_layers, triplet_layers
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from tests.support.checkpoints import write_checkpoint
from tests.support.tiny_run import recipe, tokenizer, write_run

ADAPTERS = {
    "lora": Adapter(method="lora", targets=("text.*", "vision.fc?", "audio.*_proj", "projector.linear_2"), rank=2, alpha=3.0),
    "dora": Adapter(method="dora", targets=("text.[qv]_proj", "vision.*"), rank=3),
    "adalora": Adapter(method="adalora", targets=("text.[qv]_proj", "vision.*"), rank=1, alpha=5.0, budget=RankBudget(initial_rank=4)),
    "prefix": Adapter(method="prefix", prefix_tokens=3),
    "bottleneck": Adapter(method="bottleneck", targets=("text.*", "vision.1", "audio.0"), bottleneck_size=4),
}
_ASK_PEFT = """
import sys
sys.modules["megamm"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

base, adapter, inputs, output = sys.argv[1:]
model = AutoModelForMultimodalLM.from_pretrained(base, trust_remote_code=True, local_files_only=True)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits[0].float()}, output)
"""


def write_adapter_run(run: Path, adapter: Adapter) -> None:
    """A run whose model and adapter are far from zero, and beside it, `base`, one of the model without the adapter."""
    one = dataclasses.replace(recipe(), adapter=adapter)
    pieces = tokenizer(run / "tokenizer")
    torch.manual_seed(0)
    model = MegaMMForConditionalGeneration(run_config(one, pieces.vocabulary))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(8)
        for _, layer in low_rank_layers(model):
            if layer.lora_magnitude_vector is not None:
                layer.reset_magnitude()
                layer.lora_magnitude_vector.mul_(1 + 0.3 * torch.rand_like(layer.lora_magnitude_vector))
        # What AdaLoRA leaves: layers of different ranks, some of none.
        for number, (_, layer) in enumerate(triplet_layers(model)):
            layer.lora_E[torch.randperm(4)[: number % 5]] = 0.0
            layer.lora_E.mul_(10)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = {name: value for name, value in model.state_dict().items() if name in dict(model.named_buffers())}
    write_json(run / "config.json", to_dict(one))
    write_checkpoint(run / "checkpoints", 3, parameters, buffers=buffers)
    base = run.parent / "base"
    tokenizer(base / "tokenizer")
    write_json(base / "config.json", to_dict(recipe()))
    plain = {name: value for name, value in parameters.items() if not is_adapter(name)}
    write_checkpoint(base / "checkpoints", 3, plain, buffers=buffers)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["prefix", "bottleneck", "lora"])
def test_an_adapter_travels_with_its_model(tmp_path, method):
    write_adapter_run(tmp_path / "run", ADAPTERS[method])
    folder = export(tmp_path / "run", tmp_path / "exported", dtype="float32")
    assert read_json(folder / "parity.json")["holds"] is True
    assert read_json(folder / "config.json")["adapter"]["method"] == method
    assert any(map(is_adapter, load_file(folder / "model.safetensors")))
    assert f"| adapter | {method} on " in (folder / "README.md").read_text()
    with pytest.raises(ExportError, match="view 'text' cannot hold the adapter"):
        export(tmp_path / "run", tmp_path / "viewed", views=("text",), parity=False)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_a_merged_folder_is_a_plain_model_with_the_same_answers(tmp_path, method):
    write_adapter_run(tmp_path / "run", ADAPTERS[method])
    folder = export(tmp_path / "run", tmp_path / "merged", dtype="float32", merge=True, views=("text",))
    report = read_json(folder / "parity.json")
    assert report["holds"] is True and report["merge"].keys() == {"text", "image", "audio", "image_audio"}
    assert all(row["max_logit_difference"] <= row["tolerance"] for row in report["merge"].values())
    assert read_json(folder / "config.json")["adapter"] is None
    stored, base = load_file(folder / "model.safetensors"), load_model(tmp_path / "base", dtype=torch.float32, device="cpu").model
    changed = {name for name, value in base.named_parameters() if not torch.equal(stored[name], value)}
    layers = dict(low_rank_layers(load_model(tmp_path / "run", device="cpu").model))
    adapted = {name for name, layer in layers.items() if method != "adalora" or layer.lora_E.any()}
    assert (adapted < layers.keys()) == (method == "adalora")
    assert changed == {f"{name}.weight" for name in adapted}


@pytest.mark.integration
@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_peft_makes_the_same_model_of_the_exported_base(tmp_path, method):
    pytest.importorskip("peft", reason="needs the extra `adapters`")
    write_adapter_run(tmp_path / "run", ADAPTERS[method])
    folder = export_peft(tmp_path / "run", tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = export(tmp_path / "base", tmp_path / "exported", dtype="float32", parity=False)
    loaded = load_model(tmp_path / "run", dtype=torch.float32, device="cpu")
    probe = make_probes(loaded.config)[-1]
    inputs = left_padded([make_prompt(loaded, [probe.message], probe.media)], loaded.config.pad_token_id, loaded.device)
    with torch.no_grad():
        expected = loaded.model(**inputs).logits[0]
        plain = load_model(tmp_path / "base", dtype=torch.float32, device="cpu").model(**inputs).logits[0]
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "inputs.safetensors")
    words = [str(base), str(folder), str(tmp_path / "inputs.safetensors"), str(tmp_path / "logits.safetensors")]
    result = subprocess.run([sys.executable, "-c", _ASK_PEFT, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= MAX_SHARE * scale
    assert (plain - expected).abs().max() > 1e-2 * scale


@pytest.mark.integration
def test_what_cannot_be_merged_or_kept_by_peft_is_refused(tmp_path):
    write_adapter_run(tmp_path / "run", ADAPTERS["prefix"])
    with pytest.raises(ExportError, match=r"adapter.method='prefix' cannot be merged"):
        export(tmp_path / "run", tmp_path / "merged", merge=True)
    with pytest.raises(ExportError, match=r"adapter.method='none' cannot be a peft folder"):
        export_peft(tmp_path / "base", tmp_path / "adapter")
    write_adapter_run(tmp_path / "low_rank" / "run", ADAPTERS["lora"])
    loaded = load_model(tmp_path / "low_rank" / "run", dtype=torch.float32)
    loaded.model.head = write_run(tmp_path / "headed", head=Head("linear", ("zero", "one"))).model.head
    with pytest.raises(ExportError, match=r"a peft folder holds no linear head; export with --merge, which keeps it"):
        write_peft_folder(loaded, tmp_path)
    table = json.loads((tmp_path / "run" / "config.json").read_text())
    assert table["adapter"]["method"] == "prefix"
    assert not (tmp_path / "merged").exists() and not (tmp_path / "adapter").exists()
