import dataclasses

import numpy as np
import pytest
import torch

from megamm.core.errors import ConfigError, DataError
from megamm.core.types import Message, Part
from megamm.inference import Sampling, ask, generate, make_prompt
from megamm.inference.generate import stop_ids
from megamm.inference.prompt import left_padded
from tests.support.shards import flac, jpeg
from tests.support.tiny_run import random_model

TEXT, IMAGE, SECOND, AUDIO = (
    Part("text", text="What is this?"),
    Part("image", member="0.png"),
    Part("image", member="1.png"),
    Part("audio", member="0.wav"),
)
MEDIA = {
    "0.png": jpeg(40, 30, format="PNG"),
    "1.png": jpeg(9, 64, seed=1, format="PNG"),
    "0.wav": flac(22000, format="WAV"),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def prompts(loaded):
    questions = [(TEXT,), (IMAGE, TEXT), (AUDIO,), (SECOND, AUDIO, TEXT, IMAGE), (Part("text", text="1"),)]
    return [make_prompt(loaded, [Message("user", parts)], MEDIA) for parts in questions]


def test_answers_with_the_cache_are_those_without(loaded, prompts):
    sampling = Sampling(max_new_tokens=12)
    answers = generate(loaded, prompts, sampling)
    assert answers == generate(loaded, prompts, sampling, use_cache=False)
    # Equal answers to all prompts would make this test unable to fail.
    assert len({answer.token_ids for answer in answers}) > 2


def test_a_batch_answers_as_each_prompt_alone(loaded, prompts):
    sampling = Sampling(max_new_tokens=12)
    assert generate(loaded, prompts, sampling) == [generate(loaded, [prompt], sampling)[0] for prompt in prompts]


def test_a_greedy_answer_is_the_likeliest_token_of_every_forward(loaded, prompts):
    (answer,) = generate(loaded, prompts[3:4], Sampling(max_new_tokens=6))
    inputs = left_padded(prompts[3:4], loaded.config.pad_token_id, torch.device("cpu"))
    assert len(answer.probabilities) == len(answer.token_ids)
    for token_id, probability in zip(answer.token_ids, answer.probabilities, strict=True):
        with torch.no_grad():
            logits = loaded.model(**inputs).logits[0, -1]
        assert logits.argmax() == token_id
        assert probability == pytest.approx(float(logits.softmax(-1)[token_id]), rel=1e-3)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token_id]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def test_padding_stands_on_the_left_and_media_keep_their_order(loaded, prompts):
    inputs = left_padded(prompts, loaded.config.pad_token_id, torch.device("cpu"))
    for row, prompt in enumerate(prompts):
        length = len(prompt.input_ids)
        assert inputs["attention_mask"][row].tolist() == [0] * (inputs["input_ids"].shape[1] - length) + [1] * length
        assert inputs["input_ids"][row, -length:].tolist() == prompt.input_ids.tolist()
        assert (inputs["input_ids"][row, :-length] == loaded.config.pad_token_id).all()
    pictures = [image for prompt in prompts for image in prompt.images]
    assert inputs["spatial_shapes"].tolist() == [list(picture.grid) for picture in pictures]
    for row, picture in enumerate(pictures):
        assert np.array_equal(inputs["pixel_values"][row, : len(picture.pixels)], picture.pixels)
        assert inputs["pixel_attention_mask"][row].sum() == len(picture.pixels)
    assert inputs["input_features"].shape[-1] % 100 == 0


@pytest.mark.parametrize("name", ["end", "eos"])
def test_an_answer_ends_before_its_stop_token(loaded, prompts, name):
    stop = loaded.tokenizer.vocabulary.control_id(name)
    assert stop in stop_ids(loaded)
    (free,) = generate(loaded, prompts[:1], Sampling(max_new_tokens=4))
    assert not free.is_finished
    # The head's row of the third token goes to the stop token: the answer must then end after two.
    model = loaded.model
    with torch.no_grad():
        head = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(head.clone())
        model.lm_head.weight[stop] = 1.001 * head[free.token_ids[2]]
        model.lm_head.weight[free.token_ids[2]] = 0
    try:
        (answer,) = generate(loaded, prompts[:1], Sampling(max_new_tokens=4))
    finally:
        model.lm_head.weight = head
    assert answer.is_finished
    expected = free.token_ids[: free.token_ids.index(free.token_ids[2])]
    assert answer.token_ids == expected
    assert answer.text == loaded.tokenizer.decode(expected)


def test_draws_repeat_with_the_seed_and_leave_the_global_generator_alone(loaded, prompts):
    hot = Sampling(max_new_tokens=12, temperature=2.0, seed=1)
    state = torch.get_rng_state()
    first = generate(loaded, prompts, hot)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert generate(loaded, prompts, hot) == first
    assert generate(loaded, prompts, dataclasses.replace(hot, seed=2)) != first


def test_top_k_of_one_and_a_vanishing_top_p_are_greedy(loaded, prompts):
    greedy = generate(loaded, prompts, Sampling(max_new_tokens=8))
    assert generate(loaded, prompts, Sampling(max_new_tokens=8, temperature=1.5, top_k=1)) == greedy
    assert generate(loaded, prompts, Sampling(max_new_tokens=8, temperature=1.5, top_p=1e-6)) == greedy


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_that_cannot_be_sampled_with_are_refused(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Sampling(**bad)


def test_an_answer_beyond_the_decoders_positions_is_refused(loaded, prompts):
    limit = loaded.config.text_config.max_position_embeddings
    with pytest.raises(ConfigError, match=f"exceed the decoder's {limit} positions"):
        generate(loaded, prompts[:1], Sampling(max_new_tokens=limit))


def test_asking_reads_files_before_the_text(loaded, tmp_path):
    picture, sound = tmp_path / "a.png", tmp_path / "b.wav"
    picture.write_bytes(MEDIA["0.png"])
    sound.write_bytes(MEDIA["0.wav"])
    message = Message("user", (IMAGE, AUDIO, TEXT))
    expected = generate(loaded, [make_prompt(loaded, [message], MEDIA)])[0]
    assert ask(loaded, "What is this?", images=[picture], audios=[sound]) == expected


def test_questions_that_cannot_be_asked_are_named(loaded, tmp_path):
    with pytest.raises(ConfigError, match="nothing is asked"):
        ask(loaded, "")
    with pytest.raises(ConfigError, match=r"gone\.png does not exist"):
        ask(loaded, "?", images=[tmp_path / "gone.png"])
    with pytest.raises(DataError, match=r"names member 1\.png, which is missing"):
        make_prompt(loaded, [Message("user", (SECOND,))], {"0.png": b""})
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(DataError, match="picture"):
        ask(loaded, "?", images=[broken])


def test_media_without_a_tower_are_refused(tmp_path):
    blind = random_model(tmp_path, vision="", audio=False)
    with pytest.raises(DataError, match="holds an image part, but this model has no tower"):
        make_prompt(blind, [Message("user", (IMAGE,))], MEDIA)
    with pytest.raises(DataError, match="holds an audio part, but this model has no tower"):
        make_prompt(blind, [Message("user", (AUDIO,))], MEDIA)


def test_squares_for_a_convolutional_tower_are_answered(tmp_path):
    loaded = random_model(tmp_path, vision="resnet")
    prompts = [make_prompt(loaded, [Message("user", parts)], MEDIA) for parts in [(IMAGE, TEXT), (SECOND, TEXT)]]
    sampling = Sampling(max_new_tokens=4)
    assert generate(loaded, prompts, sampling) == [generate(loaded, [prompt], sampling)[0] for prompt in prompts]
