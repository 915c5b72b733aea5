"""What an image of any mode becomes: 8-bit RGB, scaled by its range, on a background where it is transparent."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageOps

from .columns import is_count, is_list, is_number


WHITE = (255, 255, 255)
#: Attributes of an image processor that hold the two options, so that they are saved and loaded with it.
BACKGROUND, WHITE_VALUE = "image_background", "image_white"
#: What white is, by mode: the smallest that holds all values of the image. Modes not named here have 8 bits.
RANGES = {
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), (2**16 - 1,)),
    "I": (2**8 - 1, 2**16 - 1, 2**31 - 1),
    "F": (1.0, 2**8 - 1, 2**16 - 1),
}
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
BITS_PER_SAMPLE = 258  # a tag of TIFF files


def to_rgb(
    image: Image.Image, background: str | Sequence[int] | None = None, white: float | None = None
) -> Image.Image:
    """Returns a PIL image of any mode as 8-bit RGB, the way that training sees it.

    | mode | becomes |
    |---|---|
    | `1`, `L`, `P`, `RGB`, `RGBX`, `CMYK`, `YCbCr`, `LAB`, `HSV` | what Pillow's `convert("RGB")` makes of it |
    | `LA`, `PA`, `RGBA`, `La`, `RGBa`, and what has a transparent colour | composited on `background` |
    | `I;16`, `I;16L`, `I;16B`, `I;16N` | 0 to 65535 scaled to 0 to 255; of a TIFF file of fewer bits, their range |
    | `I` | the smallest range of 0 to 255, 65535 or 2^31 - 1 that holds its values, scaled to 0 to 255 |
    | `F` | the smallest of 0 to 1, 255 or 65535 likewise |

    Args:
        image: The image.
        background: Colour behind transparent pixels, a name or `"#rrggbb"` as Pillow knows them or (red, green, blue)
            from 0 to 255; `None`: white.
        white: Value that becomes 255 in modes of more than 8 bits (`I`, `F`, `I;16`...), such as 4095 for 12-bit
            data; what is above becomes 255 too. `None`: as in the table.

    Returns:
        An image of mode RGB and the same size; the image itself if it is one already.

    Raises:
        TypeError: No PIL image.
        ValueError: Values below 0, above all ranges or not finite, or options that are none.

    Example:
        >>> to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
        >>> to_rgb(Image.fromarray(np.array([[4095]], dtype=np.uint16)), white=4095).getpixel((0, 0))
        (255, 255, 255)
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"A PIL image is needed, got {type(image).__name__}; "
            "cast the column by cast_column(name, datasets.Image()), which also decodes it."
        )
    if image.mode in RANGES:
        return _scaled(image, check_background(background), check_white(white))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert(PREMULTIPLIED.get(image.mode, image.mode)).convert("RGBA")
    return _composited(image, check_background(background))


def open_image(path: str | os.PathLike, processor: Any = None) -> Image.Image:
    """Opens an image file as training sees it: turned as the camera says (EXIF), and by `to_rgb`.

    Args:
        path: The file.
        processor: The adapter's image processor, which knows its background and range; `None`: those of `to_rgb`.

    Example:
        >>> open_image("photo.jpg").mode    # doctest: +SKIP
        'RGB'
    """
    with Image.open(Path(path)) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), **options_of(processor))


def options_of(processor: Any) -> dict[str, Any]:
    """Returns the options of `to_rgb` that an image processor carries, checked.

    Raises:
        ValueError: They are none.
    """
    processor = getattr(processor, "image_processor", processor)
    background, white = (getattr(processor, name, None) for name in (BACKGROUND, WHITE_VALUE))
    check_background(background), check_white(white)
    return {"background": background, "white": white}


def check_background(value: Any) -> tuple[int, int, int]:
    """Returns the colour as (red, green, blue).

    Raises:
        ValueError: It is none.
    """
    if value is None:
        return WHITE
    if is_list(value) and len(value) == 3 and all(is_count(each, 0) and each < 256 for each in value):
        return tuple(int(each) for each in value)
    try:
        return ImageColor.getrgb(value)[:3]
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{BACKGROUND} is {value!r}, but must be a colour: a name, '#rrggbb' or three numbers from 0 to 255. Give "
            "one such as 'white'."
        ) from None


def check_white(value: Any) -> float | None:
    """Returns the value of white.

    Raises:
        ValueError: It is none.
    """
    if value is not None and not (is_number(value) and 0 < value < math.inf):
        raise ValueError(
            f"{WHITE_VALUE} is {value!r}, but must be a number above 0, the value that is white. Give one such as "
            "4095 for images of 12 bits, or leave it out."
        )
    return value


def white_of(image: Image.Image) -> float:
    """Returns the value that is white in an image of a mode in `RANGES`.

    Raises:
        ValueError: No range holds its values.
    """
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    if image.mode not in ("I", "F") and np.size(bits) and 8 < np.max(bits) < 16:
        return 2 ** int(np.max(bits)) - 1
    low, high = np.min(values := np.asarray(image)), np.max(values)
    fitting = [each for each in RANGES[image.mode] if high <= each]
    if not fitting or not low >= 0:
        raise ValueError(
            f"An image of mode {image.mode} has values from {low:g} to {high:g}, but they must lie in 0 to "
            f"{RANGES[image.mode][-1]:g}. Shift and scale them, or say what is white by {WHITE_VALUE}= of the image "
            "processor."
        )
    return fitting[0]


def _scaled(image: Image.Image, background: tuple[int, int, int], white: float | None) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" and not np.isfinite(values).all():
        raise ValueError("An image of mode F has values that are not finite numbers. Replace them.")
    scaled = values.astype(np.float64) * (255 / (white or white_of(image)))
    grey = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return _composited(grey, background)


def _composited(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An RGBA image on a background."""
    if image.getextrema()[3] == (255, 255):
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
