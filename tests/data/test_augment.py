import dataclasses

import numpy as np
import pytest
from PIL import Image

from megamm.config import AudioFeatures, Augment, ImageFeatures
from megamm.data.augment import Changes
from megamm.data.decode import audio_input, image_input
from tests.support.shards import flac, jpeg

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
EVERYTHING = Augment(
    image_shift=0.2,
    image_zoom=0.2,
    image_rotate_degrees=15.0,
    image_flip=True,
    image_brightness=0.3,
    audio_gain_db=6.0,
    audio_noise=0.1,
    audio_mask_frames=10,
    audio_mask_bands=5,
)


def changes(position=0, **settings):
    made = Changes.at(Augment(**settings), 7, position)
    assert made is not None
    return made


def test_nothing_asked_is_nothing_done():
    assert Changes.at(Augment(), 7, 0) is None


def test_a_position_draws_the_same_again_and_another_one_differently():
    one, again, other = (Changes.at(EVERYTHING, 7, position) for position in (5, 5, 6))
    assert np.array_equal(one.picture(PICTURE), again.picture(PICTURE))
    assert not np.array_equal(again.picture(PICTURE), other.picture(PICTURE))


def test_a_shift_moves_pixels_and_continues_the_edge():
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (10, 100, 3))
    moved = np.asarray(changes(image_shift=0.2).picture(Image.fromarray(ramp)))[5, :, 0].astype(int)
    shift = moved[50] - 50
    assert shift != 0
    assert (
        np.array_equal(moved, np.clip(np.arange(100) + shift, 0, 99)) or np.abs(moved - np.clip(np.arange(100) + shift, 0, 99)).max() <= 1
    )


def test_no_turn_no_zoom_no_shift_is_the_picture_itself():
    tiny = changes(image_rotate_degrees=1e-9)
    assert np.abs(np.asarray(tiny.picture(PICTURE)).astype(int) - np.asarray(PICTURE)).max() <= 1


def test_half_of_the_pictures_are_mirrored():
    mirrored = np.asarray(PICTURE)[:, ::-1]
    share = np.mean([np.array_equal(changes(position, image_flip=True).picture(PICTURE), mirrored) for position in range(400)])
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Augment)])
def test_every_setting_changes_its_medium_and_keeps_its_length(name):
    value = True if name == "image_flip" else 0.4 if name in ("image_shift", "image_zoom", "image_brightness") else 8
    picture, sound = jpeg(40, 30), flac(9000)
    images, audio = ImageFeatures(patch_size=4, max_patches=16), AudioFeatures(num_mel=40)
    plain = image_input(picture, images), audio_input(sound, audio)
    changed = False
    for position in range(8):
        image = image_input(picture, images, changes=changes(position, **{name: value}))
        heard = audio_input(sound, audio, changes=changes(position, **{name: value}))
        assert image.pixels.shape == plain[0].pixels.shape and heard.mel.shape == plain[1].mel.shape
        changed |= (
            not np.array_equal(image.pixels, plain[0].pixels) if name.startswith("image") else not np.array_equal(heard.mel, plain[1].mel)
        )
    assert changed
