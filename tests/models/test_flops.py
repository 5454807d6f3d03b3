import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megamm.config import Head
from megamm.core.lengths import AUDIO_STATE_FRAMES
from megamm.models.flops import BatchSizes, train_flops
from megamm.models.heads.flops import head_flops
from megamm.models.heads.head import KINDS, state_width
from megamm.models.heads.states import States
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from tests.support.multimodal import NUM_MEL, PATCH, document, pack, tiny_config, tiny_model, tiny_recipe

HEADS = (
    Head("linear", ("a", "b")),
    Head("linear", ("a", "b"), hidden_layers=2, hidden_size=16),
    Head("detector", ("a", "b"), hidden_size=16, num_heads=2, num_queries=5, num_layers=2),
    Head("detector", ("a", "b"), hidden_size=16, queries="cells", num_layers=2),
    Head("segmenter", ("a", "b"), hidden_size=8, num_layers=2),
    Head("ctc", ("a", "b"), hidden_size=8, time_steps=3),
)


def _counted(model, inputs) -> int:
    """What torch counts while the step runs with plain logits and explicit attention scores."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs).logits.float().square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("vision", ["siglip2_vision_model", "resnet"])
@pytest.mark.parametrize("frozen", [(), ("vision", "audio"), ("text",)])
def test_formula_equals_what_torch_counts(vision, frozen):
    recipe = tiny_recipe(vision=vision, merge=2)
    recipe = dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), trainable=False) for part in frozen})
    model = MegaMMForConditionalGeneration._from_config(tiny_config(vision=vision, merge=2), attn_implementation="eager").train()
    for part in frozen:
        getattr(model.model, {"text": "language_model"}.get(part, f"{part}_tower")).requires_grad_(False)
    picture = {"grid": (4, 4), "side": 32} if vision == "resnet" else {"grid": (4, 2)}
    one = document(0, 9, frames=300, merge=2, **picture)
    batch = pack([[one]], len(one.ids))
    inputs = batch_inputs(batch, torch.device("cpu"), torch.float32)
    for name in ("labels", "weights", "document_lengths", "num_padding"):
        del inputs[name]
    # Here every token has logits, and the mask hides half of the attention that is computed all the same.
    sizes = dataclasses.replace(BatchSizes.of(batch), num_supervised=len(one.ids))
    text = model.config.text_config
    hidden_half = 3 * text.num_hidden_layers * 2 * text.num_attention_heads * text.head_dim * len(one.ids) ** 2
    expected = train_flops(model.config, sizes, recipe) + hidden_half
    # Older transformers make the rotary angles by a matrix product.
    assert _counted(model, inputs) - expected in (0, text.head_dim * len(one.ids))


def test_padding_dummies_and_checkpointing_count_nothing():
    documents = [document(0, 5), document(1, 3)]
    tight, loose = (BatchSizes.of(pack([documents], size)) for size in (10, 40))
    assert tight == loose == BatchSizes(documents=(6, 4), num_supervised=10)
    full = BatchSizes.of(pack([[document(0, 5, grid=(2, 3), frames=70)], [document(1, 3, frames=100)]], 40))
    assert full.patches == (6,) and full.frames == (70, 100)


def test_a_frozen_decoder_costs_a_forward_alone_without_media_before_it():
    recipe = tiny_recipe()
    frozen = dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, trainable=False))
    sizes = BatchSizes(documents=(40, 20), num_supervised=30)
    config = tiny_model().config
    assert train_flops(config, sizes, recipe) == 3 * train_flops(config, sizes, frozen)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{head.kind}-{head.queries}-{head.hidden_layers}")
def test_a_head_costs_what_torch_counts(head):
    # A linear head gets one pooled state.
    width, grid = 12, (1, 1) if head.kind == "linear" else (3, 4)
    num_states = grid[0] * grid[1]
    values = torch.randn(2, num_states, width, requires_grad=True)
    states = States(values, torch.ones(2, num_states, dtype=torch.bool), [grid] * 2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = KINDS[head.kind](head, width)(states=states)
        sum(one.square().sum() for one in logits.values() if one.is_floating_point()).backward()
    # Torch counts the gradient of a depthwise convolution's weights as that of a full one.
    is_cells = head.kind == "detector" and head.queries == "cells"
    over = head.num_layers * 2 * 9 * head.hidden_size * (head.hidden_size - 1) * 2 * num_states if is_cells else 0
    assert head_flops(head, width, [num_states] * 2) + over == counter.get_total_flops()


def test_a_head_on_towers_leaves_the_decoder_and_other_towers_out():
    recipe, config = tiny_recipe(merge=2), tiny_config(merge=2)
    sizes = BatchSizes(documents=(40, 20), num_supervised=0, patches=(8, 16), frames=(100, 70))

    def flops(states: str, kind: str = "linear") -> float:
        return train_flops(config, sizes, dataclasses.replace(recipe, head=Head(kind, ("a", "b"), states=states)))

    without = {}
    for states in ("vision", "audio", "towers", "decoder"):
        head = Head("linear", ("a", "b"), states=states)
        without[states] = flops(states) - head_flops(head, state_width(head, config), [1, 1])
    assert without["towers"] == without["vision"] + without["audio"]
    assert without["decoder"] == train_flops(config, sizes, recipe) > without["towers"]
    # The decoder sees four merged cells as one state, the tower's own states are four times as many.
    detector = Head("detector", ("a", "b"))
    gained = head_flops(detector, 16, [8, 16]) - head_flops(detector, 32, [2, 4])
    assert flops("vision", "detector") - flops("decoder", "detector") == gained - (without["decoder"] - without["vision"])
    masked = train_flops(config, sizes, dataclasses.replace(recipe, head=Head("masked", states="towers")))
    assert masked - without["towers"] == 6 * 16 * (24 * 3 * PATCH**2 + 22 * AUDIO_STATE_FRAMES * NUM_MEL)
