import pytest
import torch
from torch import nn

from megamm.models.low_rank import LowRankLinear, TripletLinear


def _layer(*, has_magnitude: bool, bias: bool = True, dropout: float = 0.0) -> LowRankLinear:
    torch.manual_seed(0)
    layer = LowRankLinear(6, 5, bias, rank=2, alpha=3.0, dropout=dropout, has_magnitude=has_magnitude).double()
    if has_magnitude:
        layer.reset_magnitude()
    return layer


def _plain(layer: LowRankLinear, weight: torch.Tensor) -> nn.Linear:
    plain = nn.Linear(6, 5, bias=layer.bias is not None).double()
    plain.load_state_dict({"weight": weight} | ({} if layer.bias is None else {"bias": layer.bias.detach()}))
    return plain


@pytest.mark.parametrize("has_magnitude", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_begins_as_the_base_layer(has_magnitude, bias):
    layer, x = _layer(has_magnitude=has_magnitude, bias=bias), torch.randn(3, 4, 6, dtype=torch.float64)
    # The lengths are taken in float32.
    torch.testing.assert_close(layer(x), _plain(layer, layer.weight.detach())(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("has_magnitude", [False, True])
def test_the_merged_layer_does_the_same(has_magnitude):
    layer, x = _layer(has_magnitude=has_magnitude), torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_()
        if has_magnitude:
            layer.lora_magnitude_vector.mul_(torch.rand(5) + 0.5)
    merged = _plain(layer, layer.merged_weight())
    assert not torch.allclose(merged.weight, layer.weight)
    torch.testing.assert_close(layer(x), merged(x), rtol=1e-5, atol=1e-5)


def test_the_change_is_alpha_over_rank_times_the_product():
    layer = _layer(has_magnitude=False)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight + 1.5 * layer.lora_B @ layer.lora_A, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_lengths_are_learned_and_taken_as_constants():
    layer = _layer(has_magnitude=True)
    layer(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    assert layer.lora_magnitude_vector.grad.abs().min() > 0
    # With lora_B at zero its gradient is the output's, times what lora_A makes of the input, times factors of 1: no term of the lengths.
    expected = 1.5 * (layer.lora_A.detach() @ torch.ones(6, dtype=torch.float64)).expand(5, 2)
    torch.testing.assert_close(layer.lora_B.grad, expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_for_training_and_for_the_change_alone():
    layer, x = _layer(has_magnitude=False, dropout=0.9), torch.randn(50, 6, dtype=torch.float64)
    base = _plain(layer, layer.weight.detach())(x)
    assert torch.equal(layer(x), layer.eval()(x))  # A change of zero.
    with torch.no_grad():
        layer.lora_B.normal_()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    dropped = layer(x) - base
    assert 0.3 < (dropped.abs().sum(1) < 1e-12).double().mean() < 0.8  # 0.9^6 of the rows lose all inputs.


def test_triplets_begin_as_the_base_layer_and_merge_into_it():
    torch.manual_seed(0)
    layer = TripletLinear(6, 5, True, rank=3, alpha=4.0, dropout=0.0).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), _plain(layer, layer.weight.detach())(x))
    with torch.no_grad():
        layer.lora_A.normal_(), layer.lora_B.normal_(), layer.lora_E.normal_()
        layer.lora_E[1] = 0.0
        outer = [number * torch.outer(left, right) for left, number, right in zip(layer.lora_B.T, layer.lora_E, layer.lora_A, strict=True)]
    # A number of zero takes its triplet out, and the factor stays that of three.
    expected = layer.weight.detach() + 4 / (3 + 1e-5) * (outer[0] + outer[2])
    torch.testing.assert_close(layer(x), _plain(layer, expected)(x))
    torch.testing.assert_close(layer.merged_weight().double(), expected, rtol=1e-5, atol=1e-5)
