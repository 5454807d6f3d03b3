"""A head inside the composed model: which states it sees, where its losses go, and what stays as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megamm.config import Head, Optimizer
from megamm.core.errors import ConfigError
from megamm.core.types import HeadTargets
from megamm.models.build import build_model, parameter_groups
from megamm.models.heads.head import check_head
from megamm.models.inputs import batch_inputs
from tests.support.multimodal import document, pack, tiny_config, tiny_model, tiny_recipe

CPU = torch.device("cpu")
HEADS = {
    "linear-decoder": Head("linear", ("a", "b")),
    "linear-vision": Head("linear", ("a", "b"), states="vision"),
    "linear-towers": Head("linear", ("a", "b"), states="towers", hidden_layers=1, hidden_size=8),
    "linear-audio": Head("linear", ("a", "b"), states="audio", pool="last"),
    "detector-decoder": Head("detector", ("a", "b"), hidden_size=16, num_queries=4, num_layers=1),
    "cells-decoder": Head("detector", ("a", "b"), queries="cells", hidden_size=16, num_layers=1),
    "cells-vision": Head("detector", ("a", "b"), states="vision", queries="cells", hidden_size=16, num_layers=1),
    "detector-vision": Head("detector", ("a", "b"), states="vision", hidden_size=16, num_queries=4, num_layers=1),
    "segmenter-decoder": Head("segmenter", ("a", "b"), hidden_size=8, num_layers=1),
    "segmenter-vision": Head("segmenter", ("a", "b"), states="vision", hidden_size=8, num_layers=1),
    "ctc-decoder": Head("ctc", ("a", "b"), hidden_size=8, time_steps=2),
    "ctc-audio": Head("ctc", ("a", "b"), states="audio", hidden_size=8, time_steps=2),
}
GRIDS, FRAMES = [(2, 4), (4, 2), (2, 2)], [100, 70, 150]
MERGE = 2


def model_of(head: Head | None, seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = build_model(tiny_config(merge=MERGE, **changes), head).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.run_every_tower = True
    return model


def batch_of(head: Head, rows: list[list[int]], row_tokens: int = 90):
    """Packed rows of documents by number, each a picture, a sound and a text that no token answers, with targets."""
    batch = pack([[document(one, 3, grid=GRIDS[one], frames=FRAMES[one], merge=MERGE) for one in row] for row in rows], row_tokens)
    batch.labels[:], batch.weights[:] = -100, 0.0
    numbers = [one for row in rows for one in row]
    scale = 2**head.num_layers // (MERGE if head.states == "decoder" else 1)
    grids = [(rows * scale, columns * scale) if head.kind == "segmenter" else (0, 0) for rows, columns in (GRIDS[one] for one in numbers)]
    num_ids = [0 if head.kind == "segmenter" else 1 for _ in numbers]
    num_boxes = sum(num_ids) if head.kind == "detector" else 0
    batch.head = HeadTargets(
        weights=np.array([1.0 + one for one in numbers], np.float32),
        counts=np.ones((len(numbers), 2 if head.kind == "detector" else 1)),
        num_ids=np.array(num_ids, np.int64),
        ids=np.array([one % 2 for one, num in zip(numbers, num_ids, strict=True) if num], np.int64),
        boxes=np.tile(np.array([0.5, 0.5, 0.2, 0.3], np.float32), (num_boxes, 1)),
        grids=np.array(grids, np.int64).reshape(-1, 2),
        pixels=np.ones((2, sum(rows * columns for rows, columns in grids)), np.int16),
    )
    return batch


def run(model, batch, **changes):
    return model(**batch_inputs(batch, CPU, torch.float32, (1.0, 1.0)) | changes)


@pytest.mark.parametrize("name", HEADS)
def test_packed_equals_alone_and_losses_stand_at_last_tokens(name):
    model = model_of(HEADS[name])
    together = run(model, batch_of(HEADS[name], [[0, 1], [], [2]]))
    places = {0: (0, 0), 1: (0, 1), 2: (2, 0)}
    weighted = 0.0
    for number, (row, document_number) in places.items():
        batch = batch_of(HEADS[name], [[0, 1], [], [2]])
        last = sum(batch.document_lengths[row][: document_number + 1]) - 1
        own = run(model, batch_of(HEADS[name], [[number]]))
        assert int((own.token_losses != 0).sum()) == 1
        torch.testing.assert_close(together.token_losses[row, last], own.token_losses.sum(), rtol=1e-4, atol=1e-5)
        weighted += (1.0 + number) * float(own.token_losses.sum())
    assert together.loss.item() == pytest.approx(weighted, rel=1e-4)
    assert int((together.token_losses != 0).sum()) == 3


@pytest.mark.parametrize("name", HEADS)
def test_gradients_reach_the_head_and_what_its_states_come_from(name):
    model = model_of(HEADS[name])
    run(model, batch_of(HEADS[name], [[0, 1]])).loss.backward()
    states = HEADS[name].states
    reached = {
        "head": True,
        "model.language_model": states == "decoder",
        "model.vision_tower": states in ("decoder", "vision", "towers"),
        # The sound stands behind the picture, whose states in a causal decoder know nothing of it.
        "model.audio_tower": states in ("audio", "towers") or name in ("linear-decoder", "ctc-decoder"),
        "model.vision_projector": states == "decoder",
    }
    for part, is_reached in reached.items():
        gradients = [parameter.grad for parameter in model.get_submodule(part).parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients) == is_reached, part


@pytest.mark.parametrize("name", HEADS)
def test_a_micro_batch_without_documents_gives_zero_gradients_to_all(name):
    model = model_of(HEADS[name])
    output = run(model, batch_of(HEADS[name], [[]]))
    output.loss.backward()
    assert output.loss.item() == 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


@pytest.mark.parametrize("name", HEADS)
def test_bf16_costs_about_the_same(name):
    batch = batch_of(HEADS[name], [[0, 1], [], [2]])
    exact = run(model_of(HEADS[name]), batch).loss
    rounded = model_of(HEADS[name]).to(torch.bfloat16)
    loss = rounded(**batch_inputs(batch, CPU, torch.bfloat16, (1.0, 1.0))).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.1)
    assert all(parameter.grad.isfinite().all() for parameter in rounded.parameters())


@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("linear")])
def test_a_linear_head_pools_before_it_joins_documents(name):
    model, seen = model_of(HEADS[name]), []
    model.head.kind.register_forward_pre_hook(lambda _, __, given: seen.append(given["states"].values.shape), with_kwargs=True)
    run(model, batch_of(HEADS[name], [[0, 1], [], [2]]))
    assert seen == [(3, 1, model.head.width)]


def test_towers_that_saw_nothing_of_a_document_say_zeros():
    head = Head("linear", ("a", "b"), states="towers")
    model = model_of(head).eval()
    media = {"both": {"grid": (2, 4), "frames": 70}, "picture": {"grid": (2, 4)}, "sound": {"frames": 70}, "text": {}}

    def answers(*names):
        batch = pack([[document(1, 3, merge=MERGE, **media[name]) for name in names]], 90)
        inputs = batch_inputs(batch, CPU, torch.float32) | {"labels": None, "logits_to_keep": 1, "run_head": True}
        return model(**inputs).head_logits["labels"]

    together = answers("sound", "both", "text", "picture")
    for number, name in enumerate(("sound", "both", "text", "picture")):
        torch.testing.assert_close(together[number], answers(name)[0], rtol=1e-4, atol=1e-5)
    assert len({tuple(one) for one in together.tolist()}) == 4
    # Zeros have a norm of zero: what is left is the bias.
    torch.testing.assert_close(together[2], model.head.kind.classify(model.head.kind.norm.bias))


def test_without_a_head_nothing_changes_and_a_head_that_is_not_asked_is_silent():
    torch.manual_seed(0)
    plain, headed = tiny_model(), tiny_model()
    headed.head = model_of(HEADS["linear-decoder"]).head
    inputs = batch_inputs(pack([[document(1, grid=(2, 2))], [document(2, frames=70)]], 40), CPU, torch.float32)
    expected, found = plain(**inputs), headed(**inputs)
    assert torch.equal(expected.loss, found.loss) and found.head_logits is None
    assert not any(name.startswith("head") for name in plain.state_dict())


def test_predictions_need_no_targets_and_are_typed():
    model = model_of(HEADS["linear-decoder"]).eval()
    batch = replace(batch_of(HEADS["linear-decoder"], [[0, 1]]), head=None)
    inputs = batch_inputs(batch, CPU, torch.float32) | {"labels": None, "logits_to_keep": 1, "run_head": True}
    logits = model(**inputs).head_logits
    answers = model.head.decode(logits, [None, None])
    assert [{one.label for one in answer} for answer in answers] == [{"a", "b"}] * 2
    assert all(sum(one.score for one in answer) == pytest.approx(1) for answer in answers)


def test_a_head_trains_beside_a_frozen_backbone_at_its_own_rate():
    frozen = {name: replace(getattr(tiny_recipe(), name), trainable=False) for name in ("text", "vision", "audio")}
    recipe = replace(tiny_recipe(), **frozen, projector_lr_scale=0.0, head=replace(HEADS["linear-decoder"], lr_scale=3.0))
    model = build_model(tiny_config(), recipe.head)
    groups = {group["name"]: group for group in parameter_groups(model, recipe, Optimizer(lr=1e-3))}
    assert set(groups) == {"projector", "projector_no_decay", "head", "head_no_decay"}
    assert groups["head"]["lr"] == pytest.approx(3e-3)


def test_a_comma_in_the_one_label_of_a_sample_is_no_matter():
    check_head(Head("linear", ("cat, grey", "dog")), tiny_config())


@pytest.mark.parametrize(
    ("head", "changes", "reason"),
    [
        (Head("ctc", ("a",), states="vision"), {}, 'states="vision" is nothing for a ctc head; use one of decoder, audio'),
        (Head("detector", ("a",)), {"vision": ""}, "needs model.vision"),
        (Head("linear", ("a",), states="audio"), {"audio": False}, "needs model.audio"),
        (Head("linear", ("a",), states="towers"), {"vision": "", "audio": False}, "add a tower"),
        (Head("segmenter", ("a",), states="towers"), {}, 'states="towers" is nothing for a segmenter head'),
        (Head("linear", ("a", "b", "a")), {}, "holds 'a' twice"),
        (Head("linear", ("a", "b ")), {}, "'b ' with blanks at its ends"),
        (Head("linear", ("a", "b, c"), multi_label=True), {}, "commas stand between labels, write 'b; c'"),
        (Head("ctc", ("a", "bc")), {}, "single characters"),
        (Head("detector", ("a",), hidden_size=30, num_heads=4), {}, "set it to 16"),
        (Head("segmenter", ("a",), num_layers=9), {}, "set 6"),
    ],
)
def test_heads_that_cannot_work_are_refused(head, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        check_head(head, tiny_config(**changes))
