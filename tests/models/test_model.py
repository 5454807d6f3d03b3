import dataclasses

import numpy as np
import pytest
import torch

from megamm.core.types import Batch
from megamm.models.build import config_from_recipe
from megamm.models.checkpointing import set_activation_checkpointing
from megamm.models.inputs import batch_inputs
from megamm.models.modeling_megamm import MegaMMForConditionalGeneration
from megamm.models.parts import FrozenBatchNorm2d, merge_neighbours
from tests.support.multimodal import AUDIO, CONTROL_IDS, IMAGE, TEXT, VOCAB_SIZE, Document, document, pack, tiny_model, tiny_recipe

DOUBLE = torch.float64


def _mixed(**changes) -> list[Document]:
    return [
        document(0, 5, **changes),
        document(1, 7, grid=(2, 4), **changes),
        document(2, 4, frames=130, **changes),
        document(3, 6, grid=(4, 2), frames=60, **changes),
        document(4, 3, **changes),
        document(5, 5, grid=(2, 2), **changes),
    ]


def _run(model: MegaMMForConditionalGeneration, batches: list[Batch], dtype: torch.dtype = DOUBLE) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch_inputs(batch, torch.device("cpu"), dtype)).loss
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "merge": 2}])
def test_packed_rows_equal_the_same_samples_one_by_one(dtype, tolerance, changes):
    model = tiny_model(**changes).to(dtype)
    model.run_every_tower = True
    documents = _mixed(merge=changes.get("merge", 1))
    weights = {label: 0.5 + label / 64 for label in range(128)}
    packed = [pack([documents[:3], documents[3:]], 60, weights)]
    singles = [pack([[one]], len(one.ids), weights) for one in documents]
    loss, grads = _run(model, packed, dtype)
    expected_loss, expected_grads = _run(model, singles, dtype)
    assert loss == pytest.approx(expected_loss, rel=1e-12 if dtype == DOUBLE else 1e-6)
    # SigLIP2 interpolates positions in fp32 whatever the model's type.
    in_fp32 = {"model.vision_tower.embeddings.position_embedding.weight"}
    for name, grad in grads.items():
        atol = max(tolerance, 1e-7) if name in in_fp32 else tolerance
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        # A key bias adds the same to all scores of a query: softmax does not see it.
        assert grad.abs().max() > 1e-6 or name.endswith("k_proj.bias"), f"{name} carries no signal, so this test sees nothing of it"


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_packed_patches_equal_the_towers_own_padded_forward(checkpointing):
    """Values and gradients of pictures of several sizes at once."""
    model = tiny_model().to(DOUBLE).train()
    set_activation_checkpointing(model, checkpointing)
    inputs = batch_inputs(pack([[one for one in _mixed() if one.pictures]], 60), torch.device("cpu"), DOUBLE)
    pictures = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
    tower = model.model.vision_tower
    found = []
    for implementation in (tower.config._attn_implementation, "sdpa"):
        tower.config._attn_implementation = implementation
        model.zero_grad()
        features = model.model.get_image_features(**pictures)
        (features * torch.arange(features.numel()).view_as(features).cos()).sum().backward()
        found.append({"features": features} | {name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    packed, padded = found
    assert packed.keys() == padded.keys() and any("encoder.layers.1" in name for name in packed)
    for name, value in packed.items():
        atol = 1e-5 if "position_embedding" in name else 1e-11
        torch.testing.assert_close(value, padded[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_packed_logits_equal_single_documents_under_plain_sdpa():
    model = tiny_model().to(DOUBLE).eval()
    documents = _mixed()
    batch = batch_inputs(pack([documents], 110), torch.device("cpu"), DOUBLE)
    packed = model(**{name: value for name, value in batch.items() if name not in ("labels", "weights")}).logits[0]
    start = 0
    for one in documents:
        inputs = batch_inputs(pack([[one]], len(one.ids)), torch.device("cpu"), DOUBLE)
        media = {name: value for name, value in inputs.items() if name.startswith(("pixel", "spatial", "input_features"))}
        alone = model(input_ids=inputs["input_ids"], **media).logits[0]
        torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=0, atol=1e-11)
        start += len(alone)


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_other_stock_decoders_pack_as_well(kind):
    recipe = tiny_recipe()
    values = {name: value for name, value in TEXT.items() if name != "head_dim"}
    recipe = dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, type=kind, config=values))
    model = MegaMMForConditionalGeneration(config_from_recipe(recipe, vocab_size=VOCAB_SIZE, control_ids=CONTROL_IDS)).to(DOUBLE)
    documents = _mixed()
    loss, _ = _run(model, [pack([documents], 110)])
    assert loss == pytest.approx(_run(model, [pack([[one]], len(one.ids)) for one in documents])[0], rel=1e-12)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("vision", ["siglip2_vision_model", "resnet"])
def test_activation_checkpointing_changes_nothing(mode, vision):
    square = {"grid": (4, 4), "side": 32} if vision == "resnet" else {"grid": (2, 3)}
    documents = [document(0, 5, **square), document(1, 4, frames=120), document(2, 6)]
    batch = pack([documents, []], 60)
    model = tiny_model(vision=vision)
    model.run_every_tower = True
    model.train()
    assert set_activation_checkpointing(model, "none") == 0
    loss, grads = _run(model, [batch], torch.float32)
    num_stacks = 2 if vision == "resnet" else 3
    assert set_activation_checkpointing(model, mode) == num_stacks * (2 if mode == "full" else 1)
    runs: list[int] = []
    model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    checkpointed_loss, checkpointed_grads = _run(model, [batch], torch.float32)
    assert len(runs) == 2, "the first block must run again in the backward"
    assert checkpointed_loss == loss
    for name, grad in grads.items():
        assert (grad is None) == (checkpointed_grads[name] is None)
        assert grad is None or torch.equal(grad, checkpointed_grads[name]), name


def test_rows_of_padding_alone_have_zero_loss_and_zero_gradients():
    model = tiny_model()
    model.run_every_tower = True
    loss, grads = _run(model, [pack([[], []], 16)], torch.float32)
    assert loss == 0.0
    assert all(grad is not None and not grad.any() for grad in grads.values())


def test_token_losses_are_unweighted_detached_and_zero_elsewhere():
    model = tiny_model()
    batch = pack([[document(0, 5), document(1, 3)]], 12, {label: 2.0 for label in range(128)})
    out = model(**batch_inputs(batch, torch.device("cpu"), torch.float32))
    assert out.logits is None and not out.token_losses.requires_grad
    assert torch.equal(out.token_losses != 0, torch.from_numpy(batch.weights) > 0)
    torch.testing.assert_close(2 * out.token_losses.sum(), out.loss, rtol=1e-6, atol=0)


def test_chunk_size_of_the_loss_changes_nothing_but_rounding():
    model = tiny_model()
    inputs = batch_inputs(pack([_mixed()], 110), torch.device("cpu"), torch.float32)
    whole = model(**inputs).loss
    model.loss_chunk_tokens = 3
    torch.testing.assert_close(model(**inputs).loss, whole, rtol=1e-6, atol=0)


def test_placeholders_and_media_must_agree_in_number():
    model = tiny_model()
    inputs = batch_inputs(pack([[document(0, grid=(2, 2))]], 20), torch.device("cpu"), torch.float32)
    inputs["input_ids"][0, 2] = 5
    with pytest.raises(ValueError, match=rf"3 image placeholders \(id {IMAGE}\) but 4 image embeddings"):
        model(**inputs)
    ids = torch.tensor([[1, AUDIO, 2]])
    with pytest.raises(ValueError, match=rf"1 audio placeholders \(id {AUDIO}\) but 0 audio embeddings"):
        model(input_ids=ids)


def test_media_for_a_missing_tower_are_refused():
    inputs = batch_inputs(pack([[document(0, grid=(2, 2))]], 20), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="no image tower"):
        tiny_model(vision="")(**inputs)


def test_packing_refuses_masks_caches_and_other_attention(tmp_path):
    model = tiny_model()
    inputs = batch_inputs(pack([[document(0)]], 10), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="no attention_mask"):
        model(**inputs, attention_mask=torch.ones(1, 10))
    model.save_pretrained(tmp_path)
    eager = MegaMMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    with pytest.raises(ValueError, match="megamm_documents"):
        eager(**inputs)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"vision": "resnet"}, {"vision": "", "audio": False}])
def test_saved_model_loads_with_its_weights_and_logits(tmp_path, changes):
    model = tiny_model(**changes).eval()
    model.save_pretrained(tmp_path)
    loaded, report = MegaMMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    media = {} if "vision" in changes else {"grid": (2, 3), "frames": 90}
    inputs = batch_inputs(pack([[document(0, **media), document(1)]], 50), torch.device("cpu"), torch.float32)
    del inputs["labels"], inputs["weights"]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == changes.get("tie_word_embeddings", True)


def test_cached_generation_equals_recomputing_the_whole_sequence():
    model = tiny_model().eval()
    prompt = document(0, 4, grid=(2, 3), frames=60)
    inputs = batch_inputs(pack([[prompt]], len(prompt.ids)), torch.device("cpu"), torch.float32)
    media = {name: value for name, value in inputs.items() if name.startswith(("pixel", "spatial", "input_features"))}
    ids = inputs["input_ids"]
    cached = model.generate(input_ids=ids, **media, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids, **media).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)


def test_beams_keep_each_rows_own_media():
    model = tiny_model().eval()
    two, one = document(0, 4, grid=(2, 2)), document(1, 4, grid=(1, 3))
    first = document(2, 1, grid=(2, 3))
    # The first row holds two pictures, so that repeating pictures one by one would hand row copies each other's.
    row = Document(
        ids=first.ids + two.ids, labels=first.labels + two.labels, pictures=first.pictures + two.pictures, grids=first.grids + two.grids
    )
    width = max(len(row.ids), len(one.ids))
    ids = torch.tensor([[CONTROL_IDS["pad"]] * (width - len(r.ids)) + r.ids for r in (row, one)])
    mask = (ids != CONTROL_IDS["pad"]).long()
    media = batch_inputs(pack([[row], [one]], width), torch.device("cpu"), torch.float32)
    media = {name: media[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}
    arguments = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": -1}
    together = model.generate(input_ids=ids, attention_mask=mask, **media, **arguments)
    for index, (single, pictures) in enumerate(((row, slice(0, 2)), (one, slice(2, 3)))):
        alone = model.generate(
            input_ids=torch.tensor([single.ids]), **{name: value[pictures] for name, value in media.items()}, **arguments
        )
        assert torch.equal(together[index, width:], alone[0, len(single.ids) :])


def test_resnet_tower_keeps_its_statistics_and_affine_weights():
    model = tiny_model(vision="resnet", audio=False).train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    batch = pack([[document(0, 4, grid=(4, 4), side=32), document(1, 4, grid=(4, 4), side=32)]], 50)
    _, grads = _run(model, [batch], torch.float32)
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean) and torch.equal(norm.running_var, variance)
    frozen = {name for name, grad in grads.items() if grad is None}
    assert frozen == {name for name in grads if ".normalization." in name}


def test_frozen_norm_equals_a_norm_in_evaluation_and_keeps_fp32_statistics_beside_bf16_weights(tmp_path):
    model = tiny_model(vision="resnet")
    norm = next(module for module in model.modules() if isinstance(module, FrozenBatchNorm2d))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    plain = torch.nn.BatchNorm2d(norm.num_features).eval()
    plain.load_state_dict(norm.state_dict())
    pixels = torch.randn(2, norm.num_features, 3, 3)
    assert torch.equal(norm.train()(pixels), plain(pixels))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = plain.bfloat16().float()(pixels.bfloat16().float())
    torch.testing.assert_close(norm(pixels.bfloat16()).float(), expected, rtol=2**-7, atol=2**-6)
    model.save_pretrained(tmp_path)
    loaded = MegaMMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again = next(module for module in loaded.modules() if isinstance(module, FrozenBatchNorm2d))
    assert torch.equal(again.running_var, norm.running_var) and again.running_var.dtype == torch.float32
    batch = pack([[document(0, 4, grid=(4, 4), side=32)]], 30)
    loaded(**batch_inputs(batch, torch.device("cpu"), torch.bfloat16)).loss.backward()
    assert again.weight.grad is None


@pytest.mark.parametrize("merge", [1, 2])
def test_resnet_rows_equal_single_pictures(merge):
    model = tiny_model(vision="resnet", merge=merge).to(DOUBLE)
    model.run_every_tower = True
    documents = [document(seed, 4, grid=(4, 4), side=32, merge=merge) for seed in range(3)]
    loss, grads = _run(model, [pack([documents], 80)])
    expected_loss, expected_grads = _run(model, [pack([[one]], 30) for one in documents])
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, grad in grads.items():
        assert grad is None or torch.allclose(grad, expected_grads[name], rtol=0, atol=1e-11), name


def test_merging_keeps_reading_order_and_neighbours():
    cells = torch.arange(4 * 6).view(4, 6, 1)
    assert merge_neighbours(cells, 2).tolist()[:3] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert torch.equal(merge_neighbours(cells, 1).flatten(), torch.arange(24))


def test_batch_inputs_move_what_the_batch_has():
    full = batch_inputs(pack([[document(0, grid=(2, 2), frames=50)]], 30), torch.device("cpu"), torch.bfloat16)
    assert full["pixel_values"].dtype == full["input_features"].dtype == torch.bfloat16
    assert full["weights"].dtype == torch.float32
    empty = batch_inputs(pack([[]], 8), torch.device("cpu"), torch.float32)
    assert not {"pixel_values", "input_features", "spatial_shapes"} & set(empty)
    assert empty["document_lengths"] == [[8]] and empty["num_padding"] == [8]
    assert np.array_equal(empty["position_ids"][0], np.arange(8))


def test_bf16_model_keeps_an_fp32_loss():
    model = tiny_model().to(torch.bfloat16)
    out = model(**batch_inputs(pack([_mixed()], 110), torch.device("cpu"), torch.bfloat16))
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
