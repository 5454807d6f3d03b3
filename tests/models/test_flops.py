import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamm.models.flops import BatchSizes, train_flops
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from tests.support.multimodal import document, pack, tiny_config, tiny_model, tiny_recipe


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
