"""Digits: the demo's handwritten ones of scikit-learn, and drawn ones, for examples that need no further package."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont


NAME = "scikit-learn digits"
TEST_FRACTION = 0.25


def load_digits_dataset(seed: int = 0, per_digit: int | None = None, image_size: int = 64) -> DatasetDict:
    """Load the 1797 grey images of 8 x 8 pixels as an ordinary data set of RGB images.

    They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI), scaled up
    with a bicubic filter.

    Args:
        seed: Draws the split.
        per_digit: Keep only the first so many images of each digit. `None`: all, 174 to 183 of each.
        image_size: Height and width of the images in pixels.

    Returns:
        `train` (three quarters of each digit) and `test`, with the columns `image` (`Image`) and `label` (a
        `ClassLabel`, "0" to "9").

    Raises:
        ImportError: scikit-learn is not installed.

    Example:
        >>> load_digits_dataset()["test"].num_rows
        450
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The demo's digits come with scikit-learn, which is not installed: `pip install peft-cl[demo]`."
        ) from error
    digits = load_digits()
    places = [np.flatnonzero(digits.target == digit)[:per_digit] for digit in range(10)]
    rows = np.sort(np.concatenate(places))
    # (1797, 8, 8), ink from 0 to 16, shown dark on white: photographs, which a backbone knows, have few black frames.
    grey = np.round(255 - digits.images[rows] * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    columns = {
        "image": [Picture.fromarray(image).resize(size, Picture.Resampling.BICUBIC).convert("RGB") for image in grey],
        "label": digits.target[rows].tolist(),
    }
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    dataset = Dataset.from_dict(columns, features=features, info=DatasetInfo(features=features, dataset_name=NAME))
    return dataset.train_test_split(TEST_FRACTION, stratify_by_column="label", seed=seed)


def draw_digits_dataset(seed: int = 0, per_digit: int = 16, image_size: int = 64) -> DatasetDict:
    """Draw digits: images for examples that need nothing but this package.

    Each is a digit in the font that Pillow brings along, of some size, place, slant and grey, on a paper with noise.

    Args:
        seed: Draws the images and the split.
        per_digit: Number of images of each digit, a quarter of them for the test.
        image_size: Height and width of the images in pixels.

    Returns:
        `train` and `test`, with the columns `image` (`Image`) and `label` (a `ClassLabel`, "0" to "9").

    Example:
        >>> draw_digits_dataset()["test"].num_rows
        40
    """
    generator = np.random.default_rng(seed)
    labels = [digit for digit in range(10) for _ in range(per_digit)]
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    columns = {"image": [_drawn(str(digit), image_size, generator) for digit in labels], "label": labels}
    info = DatasetInfo(features=features, dataset_name="drawn digits")
    dataset = Dataset.from_dict(columns, features=features, info=info)
    return dataset.train_test_split(TEST_FRACTION, stratify_by_column="label", seed=seed)


def _drawn(digit: str, size: int, generator: np.random.Generator) -> Picture.Image:
    paper = Picture.new("L", (size, size), int(generator.integers(200, 256)))
    font = ImageFont.load_default(int(size * generator.uniform(0.6, 0.9)))
    place = tuple(size * (0.5 + generator.uniform(-0.08, 0.08, 2)))
    ImageDraw.Draw(paper).text(place, digit, int(generator.integers(0, 90)), font=font, anchor="mm")
    turned = paper.rotate(generator.uniform(-12, 12), Picture.Resampling.BICUBIC, fillcolor=paper.getpixel((0, 0)))
    noisy = np.asarray(turned) + generator.normal(0, 8, (size, size))
    return Picture.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB")
