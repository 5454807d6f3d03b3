"""Each head by itself: what it says, what that costs, and what it says of the source picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from megamm.config import Head
from megamm.core.geometry import Affine, PictureView
from megamm.core.masks import pixels_of
from megamm.models.heads.ctc import CtcHead
from megamm.models.heads.detector import DetectorHead, corners_of
from megamm.models.heads.linear import LinearHead
from megamm.models.heads.queries import anchors
from megamm.models.heads.segmenter import SegmenterHead, split_instances
from megamm.models.heads.states import States, places_of, side_by_side
from megamm.models.heads.targets import Targets, loss_scales

WIDTH = 12
SETTINGS = {
    "linear": Head("linear", ("cat", "dog", "cow")),
    "several": Head("linear", ("cat", "dog", "cow"), multi_label=True, pool="last"),
    "deep": Head("linear", ("cat", "dog", "cow"), hidden_layers=2, hidden_size=8),
    "detector": Head("detector", ("cell", "platelet"), hidden_size=16, num_heads=2, num_queries=5),
    "cells": Head("detector", ("cell", "platelet"), hidden_size=16, queries="cells"),
    "segmenter": Head("segmenter", ("nucleus", "wall"), hidden_size=8, num_layers=1),
    "ctc": Head("ctc", tuple("abc"), states="audio", hidden_size=8, time_steps=2),
}
KINDS = {
    "linear": LinearHead,
    "several": LinearHead,
    "deep": LinearHead,
    "detector": DetectorHead,
    "cells": DetectorHead,
    "segmenter": SegmenterHead,
    "ctc": CtcHead,
}
GRIDS = [(2, 3), (3, 1), (4, 4)]
UNIT = PictureView.whole(1, 1)


def head_of(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return KINDS[name](SETTINGS[name], WIDTH)


def states_of(seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(rows * columns, WIDTH) for rows, columns in GRIDS]


def joined(name: str, states: list[torch.Tensor], grids: list[tuple[int, int]] = GRIDS) -> States:
    """Of documents; a linear head takes one pooled state of each."""
    return States.of(side_by_side([states], SETTINGS[name].pool) if KINDS[name] is LinearHead else states, grids)


def targets_of(name: str, scales: tuple[float, ...] = (1.0, 1.0)) -> Targets:
    """For three documents; the second one's answer is the least that there is."""
    ids = {
        "linear": [[0], [2], [1]],
        "deep": [[0], [2], [1]],
        "several": [[0, 2], [], [1]],
        "detector": [[0, 1], [], [1]],
        "cells": [[0, 1], [], [1]],
        "ctc": [[0, 0, 1], [], [2]],
    }
    boxes = [torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.7, 0.6, 0.3, 0.3]]), torch.zeros(0, 4), torch.tensor([[0.5, 0.5, 0.9, 0.9]])]
    random = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 2, (2, 2 * rows, 2 * columns), generator=random) for rows, columns in GRIDS]
    return Targets(torch.tensor([1.0, 2.0, 0.5]), [torch.tensor(one).long() for one in ids.get(name, [[], [], []])], boxes, pixels, scales)


def alone(targets: Targets, number: int) -> Targets:
    one = slice(number, number + 1)
    return Targets(targets.weights[one], targets.ids[one], targets.boxes[one], targets.pixels[one], targets.scales)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_document_costs_and_says_the_same_alone_and_among_others(name):
    head, states, targets = head_of(name), states_of(), targets_of(name)
    together = head(states=joined(name, states))
    losses, answers = head.loss(together, targets), head.decode(together, [UNIT] * 3)
    assert losses.shape == (3,) and torch.isfinite(losses).all() and (losses > 0).all()
    for number in range(3):
        logits = head(states=joined(name, states[number : number + 1], GRIDS[number : number + 1]))
        torch.testing.assert_close(head.loss(logits, alone(targets, number))[0], losses[number], rtol=1e-4, atol=1e-5)
        (answer,) = head.decode(logits, [UNIT])
        assert repr_of(answer) == repr_of(answers[number])


def repr_of(answer):
    return answer if isinstance(answer, str) else [(one.label, pytest.approx(one.score, abs=1e-4)) for one in answer]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_parameter_learns_the_answer_of_a_batch(name):
    head, states, targets = head_of(name), joined(name, states_of()), targets_of(name)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = head.loss(head(states=states), targets) @ targets.weights
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in head.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_states_are_pooled_in_float32_and_stand_side_by_side():
    one, other = torch.arange(1, 7).view(3, 2).bfloat16(), torch.tensor([[256.0, 0, 1], [257, 0, 2]])
    mean, none = side_by_side([[one, one[:0]], [other, other[:1]]], "mean")
    assert mean.tolist() == [[3, 4, 256.5, 0, 1.5]] and mean.dtype == torch.float32 and none.tolist() == [[0, 0, 256, 0, 1]]
    assert torch.cat(side_by_side([[one, one[:1]]], "last")).tolist() == [[5, 6], [1, 2]]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_head_runs_on_nothing(name):
    head = head_of(name)
    logits = head(states=States.nothing(WIDTH, torch.zeros(1)))
    sum((one * 0.0).sum() for one in logits.values() if one.is_floating_point()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize(("name", "grids", "num_queries"), [("detector", GRIDS, 5), ("cells", [(2, 3)] * 3, 6)])
def test_the_detector_costs_what_the_stock_loss_says(name, grids, num_queries):
    head, targets = head_of(name), targets_of(name)
    states = States.of([torch.randn(rows * columns, WIDTH) for rows, columns in grids], grids)
    num_boxes = [len(ids) for ids in targets.ids]
    counts = sum(num + 0.1 * (num_queries - num) for num in num_boxes), sum(num_boxes)
    logits = head(states=states)
    losses = head.loss(logits, Targets(targets.weights, targets.ids, targets.boxes, [], loss_scales(3.0, counts)))
    config = SimpleNamespace(class_cost=1, bbox_cost=5, giou_cost=2, num_labels=2, eos_coefficient=0.1, auxiliary_loss=False)
    config.bbox_loss_coefficient, config.giou_loss_coefficient = 5, 2
    labels = [{"class_labels": ids, "boxes": boxes} for ids, boxes in zip(targets.ids, targets.boxes, strict=True)]
    stock, *_ = ForObjectDetectionLoss(logits["labels"], labels, "cpu", logits["boxes"], config)
    torch.testing.assert_close(losses.mean(), stock, rtol=1e-5, atol=1e-6)


def test_small_weights_scale_a_loss_as_large_ones_do():
    """Half a dozen documents of weight 0.01: what is counted sums to less than one."""
    assert loss_scales(0.06, (0.06, 0.12, 0.0)) == pytest.approx((1.0, 0.5, 0.06))


def test_logits_that_are_no_numbers_cost_no_number_instead_of_ending_the_run():
    head, targets = head_of("detector"), targets_of("detector")
    states = states_of()
    states[1] = states[1] * float("nan")
    losses = head.loss(head(states=States.of(states, GRIDS)), targets)
    assert losses.isfinite().tolist() == [True, False, True]


def test_each_cell_begins_at_its_own_middle():
    head, grid = head_of("cells"), (2, 4)
    torch.nn.init.zeros_(head.place[-1].weight)
    torch.nn.init.zeros_(head.place[-1].bias)
    boxes = head(states=States.of([torch.randn(8, WIDTH)], [grid]))["boxes"][0]
    assert boxes[5].tolist() == pytest.approx([1.5 / 4, 1.5 / 2, 0.5, 0.5]) and boxes[0].tolist() == pytest.approx([0.125, 0.25, 0.5, 0.5])


def test_queries_begin_all_over_the_view():
    middles = anchors(7, torch.device("cpu"))
    assert len({tuple(one) for one in middles.tolist()}) == 7
    corners = corners_of(middles)
    assert (corners > 0).all() and (corners < 1).all()


def test_boxes_come_back_in_source_pixels_of_a_mirrored_view():
    head = head_of("detector")
    view = PictureView(40, 20, Affine.scale(-1 / 40, 1 / 20).then(Affine.shift(1, 0)))
    logits = {"labels": torch.tensor([[[0.0, 9, 0], [0, 0, 9]]]), "boxes": torch.tensor([[[0.2, 0.5, 0.2, 0.4], [0.5, 0.5, 0.1, 0.1]]])}
    logits["mask"] = torch.tensor([[True, True]])
    ((box,),) = head.decode(logits, [view])
    assert box.label == "platelet" and box.xyxy == pytest.approx((28, 6, 36, 14), abs=1e-4) and box.score > 0.99


def test_touching_instances_come_apart_and_thin_ones_stay():
    is_set = np.zeros((8, 14), dtype=bool)
    is_set[1:7, 1:11], is_set[3, 12:] = True, True
    is_inner = np.zeros_like(is_set)
    is_inner[2:6, 2:5], is_inner[2:6, 7:10] = True, True
    numbers, num = split_instances(is_set, is_inner)
    assert num == 3 and len(np.unique(numbers[1:7, 1:11])) == 2
    assert (numbers[1:7, 1:6] == numbers[3, 3]).all() and (numbers[1:7, 7:11] == numbers[3, 8]).all()
    assert (numbers > 0).tolist() == is_set.tolist() and numbers[3, 12] not in (0, numbers[3, 3], numbers[3, 8])
    assert split_instances(np.zeros((2, 2), dtype=bool), np.zeros((2, 2), dtype=bool))[1] == 0


def test_instances_come_back_over_the_source_pixels_of_the_view():
    head = head_of("segmenter")
    # The view is the right half of a picture of 8 x 4 pixels, seen with 4 x 4.
    view = PictureView(8, 4, Affine.shift(-4, 0).then(Affine.scale(1 / 4, 1 / 4)))
    pixels = torch.full((1, 4, 4, 4), -9.0)
    pixels[..., 0] = 9
    pixels[0, 1:3, :2, 0], pixels[0, 1:3, :2, 2] = -9, 9
    ((instance,),) = head.decode({"pixels": pixels, "mask": torch.ones(1, 4, 4, dtype=torch.bool)}, [view])
    assert instance.label == "wall" and instance.size == (4, 8) and instance.score > 0.99
    expected = np.zeros((4, 8), dtype=bool)
    expected[1:3, 4:6] = True
    np.testing.assert_array_equal(pixels_of(instance.counts, (4, 8)), expected)


def test_equal_characters_need_a_pause_between():
    head = head_of("ctc")
    said = torch.nn.functional.one_hot(torch.tensor([[1, 1, 0, 1, 2, 0, 3, 3]]), 4).float()
    assert head.decode({"characters": said, "num_steps": torch.tensor([6])}, [None]) == ["aab"]


def test_places_leave_padding_out():
    places = places_of([[3, 2, 4], [9]], [4, 0])
    assert [(one.row, one.start, one.stop) for one in places] == [(0, 0, 3), (0, 3, 5), (1, 0, 9)]
    assert places_of([[7]], [7]) == []
