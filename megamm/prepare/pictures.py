"""What is drawn over pictures: sizes that boxes and masks fit, and instance maps."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from megamm.core.errors import DataError
from megamm.data.media.files import exif_orientation, open_image

MAX_INSTANCES = 65_535
_MAX_PIXELS = 64_000_000


def plain_size(content: bytes, name: str) -> tuple[int, int]:
    """Width and height of a picture whose stored pixels are the upright ones, so that coordinates fit what is decoded.

    Args:
        content: The file.
        name: Of the file, for the error.

    Raises:
        DataError: It is no picture, or its EXIF orientation turns it.
    """
    with open_image(io.BytesIO(content)) as image:
        if (orientation := exif_orientation(image)) != 1:
            raise DataError(f"{name} is turned by its EXIF orientation {orientation}, so that coordinates would not fit; store it upright")
        return image.size


def read_instances(content: bytes, size: tuple[int, int], name: str) -> np.ndarray:
    """An instance map: int32[H, W], 0 where there is none.

    Args:
        content: A PNG of one channel (8 or 16 bits, or palette numbers).
        size: Width and height of its picture.
        name: Of the file, for the error.

    Raises:
        DataError: It is no such PNG, or of another size.
    """
    with open_image(io.BytesIO(content)) as image:
        if image.format != "PNG" or image.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
            raise DataError(f"{name} is {image.format} of mode {image.mode}; a mask is a PNG of one channel of numbers")
        if image.size != size or image.width * image.height > _MAX_PIXELS:
            raise DataError(f"{name} has {image.width} x {image.height} pixels, its picture {size[0]} x {size[1]}")
        try:
            values = np.asarray(image).astype(np.int32)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{name} cannot be decoded ({error})") from None
    return values


def numbered(instances: np.ndarray) -> tuple[np.ndarray, int]:
    """The same instances with the numbers 1, 2, … without gaps, in the old order; and how many they are."""
    values, places = np.unique(instances, return_inverse=True)
    has_background = int(len(values) > 0 and values[0] == 0)
    return (places + 1 - has_background).reshape(instances.shape).astype(np.int32), len(values) - has_background


def instance_png(instances: np.ndarray) -> bytes:
    """An instance map as PNG, 8 bits where they suffice, else 16.

    Raises:
        DataError: More instances than 16 bits tell apart.
    """
    from PIL import Image

    if instances.max(initial=0) > MAX_INSTANCES:
        raise DataError(f"a mask of {instances.max()} instances; 16 bits tell {MAX_INSTANCES} apart")
    file = io.BytesIO()
    Image.fromarray(instances.astype(np.uint8 if instances.max(initial=0) < 256 else np.uint16)).save(file, format="PNG")
    return file.getvalue()


def layers(masks: Sequence[np.ndarray]) -> list[list[int]]:
    """Divide masks (bool[H, W] each) into layers without overlap, so that an instance map can hold each.

    Returns:
        The numbers of the masks of each layer, each mask in the first layer where it fits.
    """
    taken: list[np.ndarray] = []
    found: list[list[int]] = []
    for number, mask in enumerate(masks):
        for layer, used in zip(found, taken, strict=True):
            if not np.logical_and(used, mask).any():
                layer.append(number)
                used |= mask
                break
        else:
            found.append([number])
            taken.append(mask.copy())
    return found
