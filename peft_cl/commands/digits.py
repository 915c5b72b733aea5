"""The demo's data: scikit-learn's handwritten digits, real images that come with a package."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image
from PIL import Image as Picture


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
