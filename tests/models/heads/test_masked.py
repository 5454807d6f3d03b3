"""The head that fills in what was hidden: what it costs, whom it reaches, and that every rank runs all of it."""

import dataclasses

import numpy as np
import pytest
import torch

from megamm.config import Head
from megamm.core.errors import ConfigError
from megamm.core.types import HeadTargets, HiddenCells
from megamm.models.build import build_model
from megamm.models.heads.head import check_head
from megamm.models.inputs import batch_inputs
from tests.support.multimodal import NUM_MEL, PATCH, document, pack, tiny_config

CPU = torch.device("cpu")
SIZES = {"pictures": 3 * PATCH**2, "sounds": 8 * NUM_MEL}


def model_of(states: str = "towers", **changes):
    torch.manual_seed(0)
    model = build_model(tiny_config(**changes), Head("masked", states=states)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.run_every_tower = True
    return model


def hidden(of: list[tuple[int, list[int]]], size: int, seed: int = 0) -> HiddenCells | None:
    """Cells by document; the last value of each is past an end."""
    if not of:
        return None
    numbers = [number for _, cells in of for number in cells]
    values = np.random.default_rng(seed).normal(size=(len(numbers), size)).astype(np.float32)
    values[:, -1] = np.nan
    documents = [document for document, cells in of for _ in cells]
    return HiddenCells(np.array(numbers), values, np.array(documents))


def batch_of(rows, pictures=(), sounds=(), num_documents: int = 0, row_tokens: int = 60):
    batch = pack(rows, row_tokens)
    batch.labels[:], batch.weights[:] = -100, 0.0
    batch.head = HeadTargets(
        weights=np.arange(1, num_documents + 1).astype(np.float32),
        counts=np.ones((num_documents, 2)),
        num_ids=np.zeros(num_documents, np.int64),
        ids=np.zeros(0, np.int64),
        boxes=np.zeros((0, 4), np.float32),
        grids=np.zeros((num_documents, 2), np.int64),
        pixels=np.zeros((2, 0), np.int16),
        pictures=hidden(list(pictures), SIZES["pictures"]),
        sounds=hidden(list(sounds), SIZES["sounds"], seed=1),
    )
    return batch


def run(model, batch, scales=(0.5, 0.25)):
    return model(**batch_inputs(batch, CPU, torch.float32, scales))


def picture(number: int):
    return document(number, 3, grid=(2, 2))


def sound(number: int):
    return document(number, 3, frames=100)


def test_the_loss_is_the_scaled_sum_of_absolute_differences_at_hidden_cells_alone():
    model = model_of()
    batch = batch_of([[picture(0), sound(1)]], pictures=[(0, [1, 3])], sounds=[(1, [2])], num_documents=2)
    output = run(model, batch)
    logits, cells, states = output.head_logits, batch.head.pictures, batch.head.sounds
    of_picture = (logits["vision"][[1, 3], :-1] - torch.from_numpy(cells.values[:, :-1])).abs().sum()
    of_sound = (logits["audio"][[2], :-1] - torch.from_numpy(states.values[:, :-1])).abs().sum()
    torch.testing.assert_close(output.loss, 1.0 * 0.5 * of_picture + 2.0 * 0.25 * of_sound)
    at_ends = output.token_losses[output.token_losses != 0]
    torch.testing.assert_close(at_ends, torch.stack([0.5 * of_picture, 0.25 * of_sound]).detach())


def test_packed_equals_alone():
    model = model_of()
    together = run(model, batch_of([[picture(0)], [picture(1), sound(2)]], [(0, [0]), (1, [5])], [(2, [3])], 3)).token_losses
    # The same cells and the same values, each document alone: cell 5 of all is cell 1 of the second picture.
    values = hidden([(0, [0]), (1, [5])], SIZES["pictures"]).values
    for number, (own, cell, value) in enumerate([(picture(0), 0, values[0]), (picture(1), 1, values[1])]):
        batch = batch_of([[own]], num_documents=1)
        batch.head.pictures = HiddenCells(np.array([cell]), value[None], np.array([0]))
        alone = run(model, batch).token_losses
        torch.testing.assert_close(together[number][together[number] != 0][0], alone.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [[], ["picture"], ["sound"], ["picture", "sound"]], ids=["nothing", "picture", "sound", "both"])
def test_every_parameter_has_a_gradient_whatever_the_micro_batch_holds(rows):
    model = model_of()
    documents = [{"picture": picture, "sound": sound}[name](number) for number, name in enumerate(rows)]
    pictures = [(number, [0]) for number, name in enumerate(rows) if name == "picture"]
    sounds = [(number, [0]) for number, name in enumerate(rows) if name == "sound"]
    output = run(model, batch_of([documents], pictures, sounds, len(rows)))
    output.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not missing
    reached = {name: bool(model.head.kind.fill[name].weight.grad.any()) for name in ("vision", "audio")}
    assert reached == {"vision": "picture" in rows, "audio": "sound" in rows}
    assert (output.loss.item() == 0) == (not rows)


def test_a_tower_alone_and_a_convolutional_one_are_filled_in():
    model = model_of("audio", vision="")
    assert model.head.kind.widths == {"audio": 16}
    model = model_of("vision", vision="resnet")
    assert model.head.kind.fill["vision"].out_features == 3 * 8**2


@pytest.mark.parametrize(
    ("states", "changes", "reason"),
    [
        ("vision", {"vision": ""}, "needs model.vision"),
        ("towers", {"vision": "", "audio": False}, "needs model.vision or model.audio"),
    ],
)
def test_states_that_are_not_there_are_refused(states, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        check_head(Head("masked", states=states), tiny_config(**changes))


def test_it_answers_nothing_and_says_so():
    with pytest.raises(ConfigError, match="answers nothing"):
        model_of().head.decode({}, [])


def test_settings_that_do_not_go_with_a_kind_are_refused():
    with pytest.raises(ValueError, match="has no labels"):
        Head("masked", ("a",), states="vision")
    with pytest.raises(ValueError, match="in from towers' states"):
        Head("masked")
    with pytest.raises(ValueError, match="needs labels"):
        Head("linear")
    assert dataclasses.replace(Head("masked", states="vision"), mask_share=0.3).mask_share == 0.3
