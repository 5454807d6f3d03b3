import json
import random

import numpy as np
import pytest
import torch

from megamm.checkpoint import random_states

CPU = torch.device("cpu")


def draw():
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.random(), random.gauss(0, 1)]


@pytest.fixture(autouse=True)
def keep_generators():
    before = random_states.capture(CPU)
    yield
    random_states.restore(before, CPU)


@pytest.mark.parametrize("num_draws", [0, 1, 2])
def test_the_same_numbers_are_drawn_after_restoring(num_draws):
    for _ in range(num_draws):
        draw()
    states = {name: state.clone() for name, state in random_states.capture(CPU).items()}
    expected = [draw(), draw()]
    random_states.restore(states, CPU)
    assert json.dumps([draw(), draw()]) == json.dumps(expected)


def test_capturing_draws_nothing():
    states = random_states.capture(CPU)
    first = draw()
    random_states.restore(states, CPU)
    random_states.capture(CPU)
    assert draw() == first
