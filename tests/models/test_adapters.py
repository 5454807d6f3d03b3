import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from megamm.config.schema import Adapter, Optimizer
from megamm.core.errors import ConfigError
from megamm.models import attention
from megamm.models.adapters import is_adapter, low_rank_layers, merged_state
from megamm.models.attention import document_attention, make_documents
from megamm.models.build import config_from_recipe, num_parameters, parameter_groups
from megamm.models.checkpointing import set_activation_checkpointing
from megamm.models.flops import BatchSizes, train_flops
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from tests.support.multimodal import CONTROL_IDS, VOCAB_SIZE, document, pack, tiny_recipe

METHODS = ("lora", "dora", "prefix", "bottleneck")
EVERYWHERE = ("text.*", "vision.*", "audio.*", "projector.*")


def _config(adapter: Adapter, **changes):
    return config_from_recipe(tiny_recipe(**changes), vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS, adapter=adapter)


def _adapter(method: str, **changes) -> Adapter:
    towers = EVERYWHERE[:3] if method == "bottleneck" else EVERYWHERE
    return Adapter(**({"method": method, "targets": towers, "rank": 2, "prefix_tokens": 3, "bottleneck_size": 4} | changes))


def _model(adapter: Adapter, *, is_trained: bool = True, **changes) -> MegaMMForConditionalGeneration:
    """A model whose adapters do something."""
    torch.manual_seed(0)
    model = MegaMMForConditionalGeneration(_config(adapter, **changes))
    for _, layer in low_rank_layers(model):
        if layer.lora_magnitude_vector is not None:
            layer.reset_magnitude()
    if is_trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_adapter(name):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _batch():
    return pack([[document(0, 5), document(1, 4, grid=(2, 3)), document(2, 3, frames=70)], [document(3, 7)]], 60)


def _inputs(batch):
    return batch_inputs(batch, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_unpacked(method):
    model = _model(_adapter(method)).eval()
    documents = [document(0, 5), document(1, 4, grid=(2, 3)), document(2, 9)]
    packed = model(**_inputs(pack([documents], 60))).token_losses[0]
    start = 0
    for one in documents:
        length = len(one.ids)
        alone = model(**_inputs(pack([[one]], length))).token_losses[0]
        torch.testing.assert_close(packed[start : start + length], alone, rtol=1e-4, atol=1e-5)
        start += length


@pytest.mark.parametrize("method", ("prefix", "bottleneck"))
def test_padded_rows_and_a_cache_see_the_same_prefix(method):
    model = _model(_adapter(method)).eval()
    ids = torch.tensor([[65, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        packed = model(ids, document_lengths=[[7]], position_ids=torch.arange(7)[None], use_cache=False).logits
        torch.testing.assert_close(model(ids).logits, packed, rtol=1e-4, atol=1e-5)
        cache = model(ids[:, :4], use_cache=True)
        last = [model(ids[:, at : at + 1], past_key_values=cache.past_key_values, use_cache=True).logits for at in (4, 5, 6)]
        torch.testing.assert_close(torch.cat([cache.logits, *last], dim=1), packed, rtol=1e-4, atol=1e-5)
        padded = torch.cat([torch.full((1, 3), CONTROL_IDS["pad"]), ids], dim=1)
        both = torch.cat([padded, torch.arange(10)[None] % 60])
        mask = (torch.arange(10) >= torch.tensor([[3], [0]])).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded_logits = model(both, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(padded_logits[0, 3:], packed[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_begins_as_the_model_without_it(method):
    model = _model(_adapter(method), is_trained=False).eval()
    plain = MegaMMForConditionalGeneration(_config(Adapter())).eval()
    problems = plain.load_state_dict({name: value for name, value in model.state_dict().items() if not is_adapter(name)})
    assert not problems.missing_keys and not problems.unexpected_keys
    with torch.no_grad():
        ours, theirs = (one(**_inputs(_batch())).token_losses for one in (model, plain))
    # A prefix of zeros still takes its share of the attention.
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) == (method != "prefix")


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_adapter_and_nothing_else(method):
    model = _model(_adapter(method)).train()
    groups = parameter_groups(model, tiny_recipe(), Optimizer(), _adapter(method))
    model.run_every_tower = True
    model(**_inputs(_batch())).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert trained == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert sum(len(group["params"]) for group in groups) == len(trained) > 0


@pytest.mark.parametrize(("method", "mode"), product(METHODS, ["full", "selective"]))
def test_activation_checkpointing_changes_no_gradient(method, mode):
    model = _model(_adapter(method)).train()
    parameter_groups(model, tiny_recipe(), Optimizer(), _adapter(method))
    other = copy.deepcopy(model)
    assert set_activation_checkpointing(other, mode) > 0
    for one in (model, other):
        one(**_inputs(_batch())).loss.backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ("lora", "dora"))
def test_the_merged_state_is_that_of_the_plain_model(method):
    model = _model(_adapter(method)).eval()
    plain = MegaMMForConditionalGeneration(_config(Adapter())).eval()
    before = plain(**_inputs(_batch())).token_losses
    plain.load_state_dict(merged_state(model))
    ours, theirs = (one(**_inputs(_batch())).token_losses for one in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, theirs, atol=1e-2)


def test_an_absent_tower_gives_its_adapters_gradients_of_zero():
    model = _model(_adapter("lora")).train()
    parameter_groups(model, tiny_recipe(), Optimizer(), _adapter("lora"))
    model.run_every_tower = True
    model(**_inputs(pack([[document(0, 5)]], 20))).loss.backward()
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            assert parameter.grad is not None and bool(parameter.grad.any()) == ("language_model" in name), name


def test_targets_name_linear_layers_of_one_tower():
    model = _model(_adapter("lora", targets=("text.[qv]_proj", "vision.fc1", "text.q_proj")))
    adapted = {name for name, _ in low_rank_layers(model)}
    text = {f"model.language_model.layers.{layer}.self_attn.{one}" for layer in (0, 1) for one in ("q_proj", "v_proj")}
    assert adapted == text | {f"model.vision_tower.encoder.layers.{layer}.mlp.fc1" for layer in (0, 1)}


def test_blocks_are_named_by_their_number():
    model = _model(_adapter("bottleneck", targets=("text.1",)))
    assert {name.partition(".bottleneck")[0] for name, _ in model.named_parameters() if is_adapter(name)} == {
        "model.language_model.layers.1"
    }


def test_a_bottleneck_is_as_wide_as_the_decoder_whatever_ends_its_blocks():
    """Those of qwen2_moe end in the gate of a shared expert, which has one output."""
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    recipe = tiny_recipe(**moe, decoder_sparse_step=1)
    text = {key: value for key, value in recipe.text.config.items() if key != "head_dim"}
    recipe = replace(recipe, text=replace(recipe.text, type="qwen2_moe", config=text))
    adapter = _adapter("bottleneck", targets=("text.*",))
    config = config_from_recipe(recipe, vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS, adapter=adapter)
    model = MegaMMForConditionalGeneration(config)
    width = model.config.text_config.hidden_size
    assert {parameter.shape for name, parameter in model.named_parameters() if name.endswith("bottleneck.up")} == {(width, 4)}
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_the_base_may_train_as_well():
    model = _model(_adapter("lora"))
    groups = {group["name"]: group for group in parameter_groups(model, tiny_recipe(), Optimizer(), _adapter("lora", train_base=True))}
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_the_number_of_parameters_holds_the_adapter():
    plain, adapted = (num_parameters(_config(one)) for one in (Adapter(), _adapter("prefix")))
    layers, keys_and_values, heads, tokens, head_size = 2, 2, 2, 3, 8
    assert adapted["adapter"] == adapted["total"] - plain["total"] == layers * keys_and_values * heads * tokens * head_size
    assert adapted["adapter"] == adapted["language_model"] - plain["language_model"]


def test_a_frozen_base_costs_the_gradients_of_its_weights_less():
    config, sizes = _config(Adapter()), BatchSizes.of(_batch())
    whole, frozen = (train_flops(config, sizes, tiny_recipe(), adapter) for adapter in (None, _adapter("lora")))
    assert 0.6 < frozen / whole < 0.75
    # Nothing before the decoder needs a gradient, but what enters it does: projectors are counted as trained.
    text_alone = train_flops(config, sizes, tiny_recipe(), _adapter("lora", targets=("text.*",)))
    assert text_alone < frozen
    assert train_flops(config, sizes, tiny_recipe(), _adapter("lora", train_base=True)) == whole


@pytest.mark.parametrize(
    ("adapter", "changes", "message"),
    [
        (_adapter("lora", targets=("text.query",)), {}, "'text.query' is nothing that lora adapts in this model; it has text.q_proj"),
        (_adapter("lora", targets=("audio.*",)), {"audio": False}, "'audio.*' is nothing"),
        (_adapter("bottleneck", targets=("text.9",)), {}, "it has text.0, text.1, vision.0"),
        (_adapter("bottleneck", targets=("vision.*",)), {"vision": "resnet"}, "'vision.\\*' is nothing"),
    ],
)
def test_targets_that_are_not_there_are_refused(adapter, changes, message):
    with pytest.raises(ConfigError, match=message):
        _config(adapter, **changes)


def test_attention_without_documents_takes_no_prefix():
    config = _config(_adapter("prefix"))
    config.text_config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="'eager' knows no prefix"):
        MegaMMForConditionalGeneration(config)


class _Layer(nn.Module):
    num_key_value_groups, is_causal = 2, True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values

    def prefix(self):
        return self.keys, self.values


def _causal(q, k, v, bounds, _, longest, longest_key, *, scale, window_size):
    """What the variable-length kernel promises, document by document."""
    assert window_size == (-1, 0) and longest == longest_key == int((bounds[1:] - bounds[:-1]).max())
    pieces = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        pieces.append(nn.functional.scaled_dot_product_attention(*own, is_causal=True, scale=scale)[0].transpose(0, 1))
    return torch.cat(pieces)


def test_the_variable_length_path_puts_the_prefix_before_every_document(monkeypatch):
    torch.manual_seed(0)
    layer = _Layer(*(torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)))
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2))
    arguments = ([[2, 4, 3], [9]], [3, 0], torch.zeros(2, 9, 4))
    expected, _ = document_attention(layer, q, k, v, None, documents=make_documents(*arguments), scaling=0.3)
    monkeypatch.setattr(attention, "_runs_varlen", lambda embeds: True)
    monkeypatch.setattr(attention, "varlen_attn", _causal)
    found, _ = document_attention(layer, q, k, v, None, documents=make_documents(*arguments), scaling=0.3)
    real = torch.arange(9)[None] < torch.tensor([[6], [9]])
    torch.testing.assert_close(found[real], expected[real])
    weights = torch.randn_like(expected) * real[..., None, None]
    ours, theirs = (torch.autograd.grad((one * weights).sum(), (layer.keys, layer.values)) for one in (found, expected))
    torch.testing.assert_close(ours, theirs)
