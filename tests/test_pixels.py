"""What an image of each mode of Pillow becomes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageMode
from transformers import AutoImageProcessor, ViTImageProcessorPil

import peft_cl
from peft_cl import LinearProbeConfig, class_incremental, open_image, to_rgb
from peft_cl.cli import main
from peft_cl.scenarios import ImageTransform


RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))  # all 256 greys
RGB = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def array(image: PILImage.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def in_order(mode: str, values: np.ndarray) -> PILImage.Image:
    """A 16-bit image in a byte order."""
    order = ">u2" if mode == "I;16B" else "<u2"
    return PILImage.frombytes(mode, values.shape[::-1], values.astype(order).tobytes())


#: mode -> an image of it and what it must become.
PLAIN = {
    "1": (lambda: PILImage.fromarray(RAMP > 127), grey(np.where(RAMP > 127, 255, 0))),
    "L": (lambda: PILImage.fromarray(RAMP), grey(RAMP)),
    "P": (lambda: PILImage.fromarray(RAMP).convert("P"), grey(RAMP)),
    "RGB": (lambda: PILImage.fromarray(RGB), RGB),
    "RGBX": (lambda: PILImage.fromarray(RGB).convert("RGBX"), RGB),
    "CMYK": (lambda: PILImage.fromarray(RGB).convert("CMYK"), RGB),
    "LA": (lambda: PILImage.fromarray(RAMP).convert("LA"), grey(RAMP)),
    "La": (lambda: PILImage.fromarray(RAMP).convert("LA").convert("La"), grey(RAMP)),
    "PA": (lambda: PILImage.fromarray(RAMP).convert("P").convert("PA"), grey(RAMP)),
    "RGBA": (lambda: PILImage.fromarray(RGB).convert("RGBA"), RGB),
    "RGBa": (lambda: PILImage.fromarray(RGB).convert("RGBA").convert("RGBa"), RGB),
    "I;16": (lambda: in_order("I;16", RAMP * np.uint16(257)), grey(RAMP)),
    "I;16L": (lambda: in_order("I;16L", RAMP * np.uint16(257)), grey(RAMP)),
    "I;16B": (lambda: in_order("I;16B", RAMP * np.uint16(257)), grey(RAMP)),
    "I;16N": (lambda: in_order("I;16N", RAMP * np.uint16(257)), grey(RAMP)),
    "I": (lambda: PILImage.fromarray(RAMP.astype(np.int32) * 257), grey(RAMP)),
    "F": (lambda: PILImage.fromarray(RAMP.astype(np.float32) / 255), grey(RAMP)),
}
#: Other colour spaces: near what they were made from, to so many steps of 256.
SPACES = {"YCbCr": 3, "HSV": 8, "LAB": 60}


@pytest.mark.parametrize("mode", PLAIN)
def test_every_mode_is_scaled_by_its_range(mode):
    image, expected = PLAIN[mode][0](), PLAIN[mode][1]
    assert image.mode == mode
    assert np.array_equal(array(to_rgb(image)), expected)


@pytest.mark.parametrize("mode", SPACES)
def test_other_colour_spaces(mode):
    smooth = PILImage.linear_gradient("L").convert("RGB").resize((32, 32))
    image = smooth.convert(mode)
    assert image.mode == mode
    difference = np.abs(array(to_rgb(image)).astype(int) - np.asarray(smooth)).mean()
    assert difference <= SPACES[mode] and np.array_equal(array(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_no_mode_is_left_out():
    modes = {*ImageMode._modes} if hasattr(ImageMode, "_modes") else {*PILImage.MODES}
    assert {*PILImage.MODES} | modes <= {*PLAIN, *SPACES, "BGR;15", "BGR;16", "BGR;24"} | {"I;16"}


@pytest.mark.parametrize("largest", [255, 65535, 2**31 - 1])
def test_the_range_of_whole_numbers_is_that_which_holds_them(largest):
    values = np.linspace(0, largest, 256).round().astype(np.int32)[None]
    assert np.abs(array(to_rgb(PILImage.fromarray(values))).astype(int) - grey(RAMP[:1])).max() == 0


@pytest.mark.parametrize("largest", [1, 255, 65535])
def test_the_range_of_floats_is_that_which_holds_them(largest):
    values = (np.linspace(0, 1, 256) * largest).astype(np.float32)[None]
    assert np.array_equal(array(to_rgb(PILImage.fromarray(values))), grey(RAMP[:1]))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_white_is_an_option(dtype):
    twelve_bits = np.linspace(0, 4095, 256).round().astype(dtype)[None]
    assert np.array_equal(array(to_rgb(PILImage.fromarray(twelve_bits), white=4095)), grey(RAMP[:1]))
    assert array(to_rgb(PILImage.fromarray(twelve_bits * dtype(2)), white=4095)).max() == 255


def test_twelve_bits_of_a_tiff_file_are_its_range():
    """libtiff writes no 12 bits here, so the tag stands in for what its reader finds."""
    image = PILImage.fromarray(np.linspace(0, 4095, 256).round().astype(np.uint16)[None])
    image.tag_v2 = {258: (12,)}
    assert np.array_equal(array(to_rgb(image)), grey(RAMP[:1]))


@pytest.mark.parametrize("values", [[[-1.0, 1.0]], [[0.0, 1e6]], [[0.0, float("nan")]], [[0.0, float("inf")]]])
def test_values_without_a_range_are_refused(values):
    with pytest.raises(ValueError, match="An image of mode F has values .* (Shift and scale|Replace) them"):
        to_rgb(PILImage.fromarray(np.array(values, dtype=np.float32)))


# ----------------------------------------------------------------------------------------------- transparency


def transparent(mode: str, seen: bool = False) -> PILImage.Image:
    """Red where `seen`, else a hidden colour under full transparency; as the mode has it."""
    image = PILImage.new("RGBA", (4, 4), (255, 0, 0, 255) if seen else (0, 0, 255, 0))
    if mode == "P":
        file = io.BytesIO()
        image.quantize(4).save(file, format="PNG")
        return PILImage.open(file)
    return image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa", "P"])
@pytest.mark.parametrize(
    ("background", "expected"),
    [(None, (255,) * 3), ("black", (0,) * 3), ("#102030", (16, 32, 48)), ([1, 2, 3], (1, 2, 3))],
)
def test_transparent_pixels_show_the_background(mode, background, expected):
    image = transparent(mode)
    assert image.mode == mode
    assert to_rgb(image, background=background).getcolors() == [(16, expected)]


def test_palettes_without_a_file():
    image = transparent("RGBA").quantize(4)
    assert image.mode == "P" and to_rgb(image).getcolors() == [(16, (255, 255, 255))]


@pytest.mark.parametrize(
    ("mode", "value", "key"),
    [
        ("L", 7, 7),
        ("1", 0, 0),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("P", 5, 5),
        ("P", 0, bytes([0, 255])),
        ("I;16", 9, 9),
        ("I", 9, 9),
    ],
)
def test_a_transparent_colour_shows_the_background(mode, value, key):
    image = PILImage.new(mode, (4, 4), value)
    image.info["transparency"] = key
    assert to_rgb(image, background="lime").getcolors() == [(16, (0, 255, 0))]


def test_half_transparent_pixels_are_mixed():
    image = PILImage.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert to_rgb(image).getpixel((0, 0)) == (255, 127, 127)
    assert to_rgb(image, background="black").getpixel((0, 0)) == (128, 0, 0)


def test_shapes_that_differ_in_alpha_differ():
    shapes = [PILImage.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(2)]
    shapes[0].paste((0, 0, 0, 255), (0, 0, 4, 8))
    shapes[1].paste((0, 0, 0, 255), (0, 0, 8, 4))
    first, second = ImageTransform(ViTImageProcessorPil(size={"height": 8, "width": 8}))(shapes)
    assert not torch.equal(first, second)


# ----------------------------------------------------------------------------------------------- the options' ways


@pytest.mark.parametrize("background", ["blak", 3, (1, 2), (0, 0, 256), (0.5, 0, 0)])
def test_a_background_is_a_colour(background):
    with pytest.raises(ValueError, match="image_background is .*, but must be a colour: .* such as 'white'"):
        ImageTransform(ViTImageProcessorPil(size={"height": 8, "width": 8}, image_background=background))


@pytest.mark.parametrize("white", [0, -1, "4095", float("nan"), True])
def test_white_is_a_number(white):
    with pytest.raises(ValueError, match="image_white is .*, but must be a number above 0"):
        ImageTransform(ViTImageProcessorPil(size={"height": 8, "width": 8}, image_white=white))


def test_the_processor_carries_the_options(tmp_path):
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_background="black", image_white=4095).save_pretrained(
        tmp_path
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = [PILImage.new("RGBA", (8, 8), (9, 9, 9, 0)), PILImage.fromarray(np.full((8, 8), 4095, dtype=np.uint16))]
    values = ImageTransform(processor)(images)
    assert values[0].unique().tolist() == [-1] and values[1].unique().tolist() == [1]
    images[0].save(tmp_path / "image.png")
    assert open_image(tmp_path / "image.png", processor).getcolors() == [(64, (0, 0, 0))]


def test_other_options_are_other_images_in_the_caches():
    def digest(**options):
        return ImageTransform(ViTImageProcessorPil(size={"height": 8, "width": 8}, **options)).digest

    assert len({digest(), digest(image_background="black"), digest(image_white=4095)}) == 3


def test_open_image_turns_as_the_camera_says(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("L", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 6)
    seen = Dataset.from_dict({"image": [str(tmp_path / "a.jpg")]}).cast_column("image", Image())[0]["image"]
    assert np.array_equal(array(to_rgb(seen)), array(open_image(tmp_path / "a.jpg")))


def test_the_card_opens_images_as_training_does(trained):
    assert 'image = peft_cl.open_image("image.jpg", processor)' in (trained / "README.md").read_text()
    assert peft_cl.open_image is open_image


def bit_depth(bits: int, seed: int) -> Dataset:
    """Two classes of grey images, dark and bright."""
    rng = np.random.default_rng(seed)
    quarter = 2 ** (bits - 2)
    images, labels = [], [0, 1] * 8
    for label in labels:
        values = rng.integers(0, quarter, (32, 32)) + 3 * quarter * label
        values[0, 0] = (2**bits - 1) * label
        images.append(PILImage.fromarray(values.astype(np.uint16)))
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "bright"])})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_sixteen_bits_are_learnt_and_twelve_need_their_range(make_trainer):
    def trainer(bits, **options):
        data = {"train": bit_depth(bits, 0), "test": bit_depth(bits, 1)}
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **options)
        return make_trainer(
            LinearProbeConfig(), scenario=class_incremental(data, 1), processing_class=processor, num_train_epochs=6
        )

    for made in (trainer(16), trainer(12, image_white=4095)):
        made.train()
        assert made.metrics["average_accuracy"] > 0.9
    with pytest.raises(ValueError, match="no value above 4095 of 65535.*image_white=4095"):
        trainer(12)


def test_the_options_in_a_configuration(train, tmp_path):
    assert train("--processor.image_background", "black", "--training.num_train_epochs", "1") == 0
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").image_background == "black"
    assert main(["info", str(tmp_path / "out")]) == 0


def test_a_wrong_background_in_a_configuration(refused):
    assert "image_background is 'blak', but must be a colour" in refused("--processor.image_background", "blak")
