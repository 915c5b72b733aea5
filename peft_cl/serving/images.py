"""Images that visitors of the page give: files that may be anything."""

from __future__ import annotations

import warnings
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..scenarios import open_image
from ..text import plain


#: Images of one lesson, bytes of a file, and pixels of an image that are taken.
MOST_IMAGES, MOST_BYTES, MOST_PIXELS = 50, 20 * 2**20, 50_000_000


class ImageFault(Exception):
    """A file is no image that can be taken; the message is a sentence for the visitor."""


def read_image(file: str, processor: Any) -> Image.Image:
    """The image in a file as training sees it; its size is looked at before it is unpacked.

    Raises:
        ImageFault: It is no image, is damaged, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(file) as image:
                width, height = image.size
            if width * height > MOST_PIXELS:
                raise ImageFault(
                    f"The image has {width:,} x {height:,} pixels, but at most {MOST_PIXELS:,} are taken. Make it "
                    "smaller."
                )
            return open_image(file, processor)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        too_large = isinstance(error, Image.DecompressionBombError)
        what = "has far too many pixels" if too_large else "is not one that can be read"
        raise ImageFault(f"The file {what}. Give a JPEG or PNG image.") from error
    except (OSError, ValueError, SyntaxError, MemoryError, EOFError) as error:
        raise ImageFault(f"The image is damaged ({plain(error)}). Give another file.") from error
