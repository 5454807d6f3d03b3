"""Every forward runs every tower once; a tower without input gets gradients that are zero, not none."""

from itertools import product

import pytest
import torch

from megamm.models.inputs import batch_inputs
from tests.support.multimodal import document, pack, tiny_model

SUBSETS = {"none": [], "text": [{}], "image": [{"grid": (2, 3)}], "audio": [{"frames": 70}], "both": [{"grid": (2, 2)}, {"frames": 150}]}
PARTS = ("vision_tower", "vision_projector", "audio_tower", "multi_modal_projector")


def _batch(name: str, **changes):
    documents = [document(seed, 4, **(media | (changes if "grid" in media else {}))) for seed, media in enumerate(SUBSETS[name])]
    return pack([documents], 50)


def _absent(name: str) -> set[str]:
    absent = set() if name in ("image", "both") else {"vision_tower", "vision_projector"}
    return absent | (set() if name in ("audio", "both") else {"audio_tower", "multi_modal_projector"})


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.parametrize("vision", ["siglip2_vision_model", "resnet"])
def test_absent_towers_get_zero_gradients_and_present_ones_do_not(name, vision):
    model = tiny_model(vision=vision).train()
    model.run_every_tower = True
    changes = {"grid": (4, 4), "side": 32} if vision == "resnet" else {}
    model(**batch_inputs(_batch(name, **changes), torch.device("cpu"), torch.float32)).loss.backward()
    for part in PARTS:
        for key, parameter in getattr(model.model, part).named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, f"{part}.{key}"
            assert bool(parameter.grad.any()) == (part not in _absent(name)), f"{part}.{key}"
    assert bool(model.model.language_model.norm.weight.grad.any()) == (name != "none")


@pytest.mark.parametrize("name", SUBSETS)
def test_every_tower_runs_once_in_one_order(name):
    model = tiny_model().train()
    model.run_every_tower = True
    order: list[str] = []
    for part, module in {**dict.fromkeys((*PARTS, "language_model"), ""), "vision_tower": ".encoder"}.items():
        # Patches are packed, so that the tower's parts run and not its own forward.
        model.model.get_submodule(part + module).register_forward_pre_hook(lambda *_, part=part: order.append(part))
    model(**batch_inputs(_batch(name), torch.device("cpu"), torch.float32))
    assert order == [*PARTS, "language_model"]


@pytest.mark.parametrize("name", SUBSETS)
def test_dummies_change_neither_loss_nor_gradients(name):
    model = tiny_model().train()
    inputs = batch_inputs(_batch(name), torch.device("cpu"), torch.float32)
    results = []
    for run_every_tower in (False, True):
        model.zero_grad()
        model.run_every_tower = run_every_tower
        loss = model(**inputs).loss
        loss.backward()
        results.append((loss.item(), {key: parameter.grad for key, parameter in model.named_parameters()}))
    (loss, grads), (contract_loss, contract_grads) = results
    assert contract_loss == loss
    for key, grad in contract_grads.items():
        assert torch.equal(grad, torch.zeros_like(grad) if grads[key] is None else grads[key]), key


@pytest.mark.parametrize(
    ("name", "frozen"), product(SUBSETS, [("vision_tower",), ("audio_tower",), ("vision_tower", "audio_tower", "language_model")])
)
def test_frozen_towers_still_run_and_their_projectors_still_get_gradients(name, frozen):
    model = tiny_model().train()
    model.run_every_tower = True
    for part in frozen:
        getattr(model.model, part).requires_grad_(False)
    ran = []
    model.model.vision_tower.encoder.register_forward_pre_hook(lambda *_: ran.append("vision"))
    model.model.audio_tower.register_forward_pre_hook(lambda *_: ran.append("audio"))
    model(**batch_inputs(_batch(name), torch.device("cpu"), torch.float32)).loss.backward()
    assert ran == ["vision", "audio"]
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), key


def test_large_activations_of_a_dummy_do_not_reach_the_loss():
    model = tiny_model().train()
    inputs = batch_inputs(_batch("text"), torch.device("cpu"), torch.float32)
    expected = model(**inputs).loss
    model.run_every_tower = True
    with torch.no_grad():
        # The sum of these would overflow fp32 if it were taken before the multiplication by zero.
        model.model.vision_projector.linear_2.bias.fill_(3e38)
    assert torch.equal(model(**inputs).loss, expected)
