import io

import numpy as np
import pytest
import soundfile
import torch

from megamm.core.types import Part
from megamm.export.parity import Expected, row_of, worst_of
from megamm.export.probes import make_probes
from megamm.inference import make_prompt
from tests.support.tiny_run import random_model

VOCAB = 7


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("parity"))


def sides(loaded, dtype=torch.float32):
    """A picture's reference and what a fresh process that agrees with it returns."""
    probe = make_probes(loaded.config)[1]
    logits = torch.linspace(-8, 8, 5 * VOCAB).view(5, VOCAB).to(dtype).float()
    inputs = {"input_ids": torch.arange(5)[None], "pixel_values": torch.rand(1, 4, 48)}
    padded = torch.cat([inputs["pixel_values"], torch.zeros(1, 3, 48)], dim=1)
    results = {
        "logits": logits[None].clone(),
        "processed_logits": logits[None].clone(),
        "float32_logits": logits[None].clone(),
        "processed/input_ids": inputs["input_ids"].clone(),
        "processed/pixel_values": padded,
        "answer": torch.tensor([[4, 2, 0]]),
    }
    # The second token leads the next one by one; the first leads by four.
    answer_logits = torch.tensor([[0, 1, 2, 3, 8, 4, 0], [0, 1, 6, 5, 2, 1, 0]], dtype=torch.float32)
    return Expected(probe, inputs, logits, (4, 2), answer_logits), {f"image/{name}": value for name, value in results.items()}


def test_equal_sides_hold(loaded):
    row = row_of(*sides(loaded), torch.float32)
    assert row["holds"] and row["equal_answer"] and row["answer_agrees"]
    assert row["max_logit_difference"] == 0
    assert row["tolerance"] == pytest.approx(8e-5)


@pytest.mark.parametrize("dtype, below, above", [(torch.float32, 7e-5, 9e-5), (torch.bfloat16, 0.12, 0.13), (torch.float16, 0.03, 0.032)])
def test_logits_must_agree_within_the_types_tolerance(loaded, dtype, below, above):
    for change, holds in ((below, True), (above, False), (float("nan"), False), (float("inf"), False)):
        reference, results = sides(loaded, dtype)
        results["image/logits"][0, 2, 3] += change
        assert row_of(reference, results, dtype)["holds"] is holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_from_raw_media_must_agree_in_float32_whatever_the_type(loaded, dtype):
    for change, holds in ((7e-3, True), (9e-3, False), (float("nan"), False), (float("inf"), False)):
        reference, results = sides(loaded, dtype)
        results["image/processed_logits"][0, 2, 3] += change
        assert row_of(reference, results, dtype)["holds"] is holds


def test_prompt_tokens_and_features_must_agree(loaded):
    reference, results = sides(loaded)
    results["image/processed/input_ids"][0, 1] += 1
    assert not row_of(reference, results, torch.float32)["holds"]
    reference, results = sides(loaded)
    results["image/processed/pixel_values"][0, 1, 1] += 2e-4
    row = row_of(reference, results, torch.float32)
    assert not row["holds"]
    assert row["max_feature_differences"] == [pytest.approx(2e-4, rel=1e-2)]


def test_answers_must_be_equal(loaded):
    for answer in ([4, 3, 0], [5, 2, 0], [4]):
        reference, results = sides(loaded)
        results["image/answer"] = torch.tensor([answer])
        row = row_of(reference, results, torch.float32)
        assert not row["holds"] and not row["equal_answer"] and not row["answer_agrees"]


def test_answers_may_part_where_the_tolerance_leaves_the_token_open(loaded):
    for lead, agrees in ((0.0, True), (1.9 * 8e-5, True), (2.1 * 8e-5, False)):
        reference, results = sides(loaded)
        reference.answer_logits[1, 3] = reference.answer_logits[1, 2] - lead
        results["image/answer"] = torch.tensor([[4, 3, 6]])
        row = row_of(reference, results, torch.float32)
        assert row["holds"] is row["answer_agrees"] is agrees
        assert not row["equal_answer"]


def test_other_shapes_never_hold(loaded):
    reference, results = sides(loaded)
    results["image/logits"] = results["image/logits"][:, :, :-1]
    row = row_of(reference, results, torch.float32)
    assert not row["holds"] and row["max_logit_difference"] is None
    assert worst_of([row | {"max_logit_difference": 1e9}, row]) == row


def test_small_logits_keep_the_tolerance_of_their_addends(loaded):
    reference, results = sides(loaded)
    reference.logits.zero_()
    results["image/logits"].zero_()
    results["image/processed_logits"].zero_()
    assert row_of(reference, results, torch.bfloat16)["tolerance"] == 2**-9


def test_the_worst_probe_is_the_one_closest_to_its_own_tolerance():
    rows = [{"max_logit_difference": 0.5, "tolerance": 1.0}, {"max_logit_difference": 0.1, "tolerance": 0.125}]
    assert worst_of(rows) is rows[1]


def test_probes_ask_about_every_modality_and_are_the_same_every_time(loaded):
    probes = make_probes(loaded.config)
    assert [probe.name for probe in probes] == ["text", "image", "audio", "image_audio"]
    for probe, again in zip(probes, make_probes(loaded.config), strict=True):
        assert probe.media.get("0.png") == again.media.get("0.png")
        # Samples, because the file's peak chunk holds the second at which it was written.
        assert (probe.sound is None) == ("0.wav" not in probe.media)
        if probe.sound is not None:
            for media in (probe.media, again.media):
                assert np.array_equal(soundfile.read(io.BytesIO(media["0.wav"]), dtype="float32")[0], probe.sound)
        prompt = make_prompt(loaded, [probe.message], probe.media)
        assert len(prompt.images) == (probe.picture is not None)
        assert len(prompt.audios) == (probe.sound is not None)
        assert probe.message.content[-1] == Part("text", text=probe.message.content[-1].text)
    assert np.array_equal(probes[1].picture, probes[3].picture)
