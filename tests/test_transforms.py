"""Augmentation, image transform and collator: equal to the image processor, repeatable, clear about wrong labels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, DeiTImageProcessor, ViTImageProcessor

from peft_cl.scenarios import ContinualCollator, ImageTransform, RandomResizedCropFlip


HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.2]}
PROCESSORS = {
    "scaled": lambda: ViTImageProcessor(size={"height": 24, "width": 32}, resample=3, **HALF),
    "not normalised": lambda: ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "shortest edge, central crop": lambda: CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32),
    "scaled, central crop": lambda: DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size=32, **HALF),
}


@pytest.fixture(params=PROCESSORS, ids=str)
def processor(request):
    return PROCESSORS[request.param]()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class CountingProcessor:
    """Passes on to a processor and counts the calls."""

    def __init__(self, processor):
        self.processor, self.calls = processor, 0

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, images, **kwargs):
        self.calls += 1
        return self.processor(images=images, **kwargs)


def test_transform_equals_the_processor_bit_for_bit(processor):
    images = [noise(32, 32), noise(24, 32, 1), noise(50, 41, 2), noise(9, 70, 3), Image.new("RGB", (300, 200), "red")]
    values = ImageTransform(processor)(images)
    assert values.dtype == torch.float32 and values.is_contiguous()
    assert torch.equal(values, processor(images=images, return_tensors="pt")["pixel_values"])


def test_transform_does_not_call_a_processor_that_only_scales():
    processor = CountingProcessor(PROCESSORS["scaled"]())
    transform = ImageTransform(processor)
    made = processor.calls
    transform([noise(32, 32)])
    assert processor.calls == made


def test_transform_calls_a_processor_of_another_make():
    def inverted(images, return_tensors):
        pixels = np.stack([np.asarray(image.resize((8, 8))) for image in images])
        return {"pixel_values": 255 - torch.tensor(pixels).movedim(-1, 1)}

    transform = ImageTransform(inverted)
    assert transform.output_size == (8, 8)
    assert torch.equal(
        transform([Image.new("RGB", (9, 9), (255, 5, 0))])[0, :, 0, 0], torch.tensor([0.0, 250.0, 255.0])
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_transform_converts_every_mode_to_rgb(processor, mode):
    image = noise(40, 40).convert(mode)
    expected = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageTransform(processor)([image]), expected)


def test_transform_takes_the_image_processor_of_a_processor(processor):
    class Multimodal:
        image_processor = processor

    assert torch.equal(ImageTransform(Multimodal())([noise(9, 9)]), ImageTransform(processor)([noise(9, 9)]))


def test_transform_survives_pickling(processor):
    transform = ImageTransform(processor, RandomResizedCropFlip())
    copy = pickle.loads(pickle.dumps(transform))
    torch.manual_seed(0)
    expected = transform([noise(40, 40)])
    torch.manual_seed(0)
    assert torch.equal(copy([noise(40, 40)]), expected)


def test_making_a_transform_leaves_the_random_states_alone(processor):
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    ImageTransform(processor, RandomResizedCropFlip())
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


def test_augmented_image_is_not_cropped_again(processor):
    """An augmentation that leaves all as it is, at the output size: the values are mapped, no pixel is moved."""
    height, width = ImageTransform(processor).output_size
    ratio = width / height
    transform = ImageTransform(processor, RandomResizedCropFlip(scale=(1, 1), ratio=(ratio, ratio), flip=0))
    image = noise(height, width)
    switches = {name: False for name in ("do_resize", "do_center_crop") if getattr(processor, name, False)}
    assert torch.equal(transform([image]), processor(images=image, return_tensors="pt", **switches)["pixel_values"])


def test_augmentation_of_another_size_is_scaled_by_the_processor(processor):
    augmentation = RandomResizedCropFlip(size=(48, 56))
    torch.manual_seed(0)
    augmented = augmentation(noise(40, 40))
    torch.manual_seed(0)
    values = ImageTransform(processor, augmentation)([noise(40, 40)])
    assert torch.equal(values, processor(images=augmented, return_tensors="pt")["pixel_values"])


def test_transform_without_one_output_size():
    processor = ViTImageProcessor(size={"shortest_edge": 16, "longest_edge": 64})
    transform = ImageTransform(processor)
    assert transform.output_size is None
    assert transform([noise(20, 30), noise(20, 30, 1)]).shape[:2] == (2, 3)
    with pytest.raises(ValueError, match=r"cannot make one batch.*set a fixed one"):
        transform([noise(20, 30), noise(30, 20)])
    with pytest.raises(ValueError, match=r"RandomResizedCropFlip\(size="):
        ImageTransform(processor, RandomResizedCropFlip())
    assert ImageTransform(processor, RandomResizedCropFlip(16))([noise(20, 30), noise(30, 20)]).shape == (2, 3, 16, 16)


def test_transform_refuses_what_it_cannot_do(processor):
    transform = ImageTransform(processor)
    with pytest.raises(TypeError, match=r"PIL image is needed, got dict.*cast_column"):
        transform([{"bytes": b"", "path": None}])
    with pytest.raises(ValueError, match="empty list"):
        transform([])
    with pytest.raises(ValueError, match=r"pixel_values of shape \(1, 7, 5\)"):
        ImageTransform(lambda images, return_tensors: {"pixel_values": torch.zeros(len(images), 7, 5)})


def test_augmentation_follows_torchs_random_state_only():
    augmentation = RandomResizedCropFlip(16)
    torch.manual_seed(5)
    first = [np.asarray(augmentation(noise(32, 32))) for _ in range(4)]
    torch.manual_seed(5)
    np.random.seed(1)
    again = [np.asarray(augmentation(noise(32, 32))) for _ in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_augmentation_draws_the_same_number_for_every_image():
    states = []
    for shape in ((32, 32), (4, 400)):
        torch.manual_seed(5)
        RandomResizedCropFlip(16)(noise(*shape))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_crops_keep_to_the_ranges_and_reach_the_rims():
    """On an image whose red is x and green is y, the colours tell where the crop was."""
    coordinates = np.zeros((100, 100, 3), dtype=np.uint8)
    coordinates[..., 0], coordinates[..., 1] = np.arange(100)[None], np.arange(100)[:, None]
    augmentation = RandomResizedCropFlip(size=100, scale=(0.2, 0.5), ratio=(0.5, 2.0), flip=0)
    torch.manual_seed(0)
    corners = []
    for _ in range(300):
        pixels = np.asarray(augmentation(Image.fromarray(coordinates))).astype(int)
        corners.append([pixels[50, 0, 0], pixels[50, -1, 0] + 1, pixels[0, 50, 1], pixels[-1, 50, 1] + 1])
    left, right, top, bottom = np.array(corners).T
    # One pixel more or less at each rim: the filter and the rounding of colours.
    width, height = right - left, bottom - top
    share, ratio = width * height / 100**2, width / height
    assert 0.17 < share.min() < 0.23 and 0.47 < share.max() < 0.53
    assert 0.46 < ratio.min() < 0.6 and 1.7 < ratio.max() < 2.15
    assert left.min() == top.min() == 0 and right.max() >= 99 and bottom.max() >= 99
    assert abs(np.log(ratio).mean()) < 0.1 and abs((left + right).mean() - 100) < 6


def test_flip_mirrors_with_its_probability():
    whole = {"scale": (1, 1), "ratio": (1, 1)}
    image = noise(8, 8)
    mirrored = np.asarray(image)[:, ::-1]
    assert np.array_equal(np.asarray(RandomResizedCropFlip(**whole, flip=1)(image)), mirrored)
    assert np.array_equal(np.asarray(RandomResizedCropFlip(**whole, flip=0)(image)), np.asarray(image))
    torch.manual_seed(0)
    flips = [np.array_equal(np.asarray(RandomResizedCropFlip(**whole)(image)), mirrored) for _ in range(400)]
    assert 0.42 < np.mean(flips) < 0.58


def test_image_too_long_for_the_ratio_gets_its_central_crop():
    image = Image.new("RGB", (100, 10), "black")
    image.paste("white", (45, 0, 55, 10))
    pixels = np.asarray(RandomResizedCropFlip(10, scale=(1, 1), ratio=(1, 1), flip=0)(image))
    assert (pixels[:, 2:-2] == 255).all()


def test_resize_comes_before_the_crop():
    image = noise(20, 40)
    whole = RandomResizedCropFlip(size=24, scale=(1, 1), ratio=(1, 1), flip=0, resize=32)(image)
    expected = image.resize((32, 32), Image.Resampling.BICUBIC).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(whole), np.asarray(expected))
    assert RandomResizedCropFlip()(image).size == (40, 20)
    assert RandomResizedCropFlip(resize=(30, 50))(image).size == (50, 30)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"size": 0}, {"size": (8, 8, 8)}, {"size": 8.5}, {"resize": "8"}, {"flip": 1.5}),
        *({"size": True}, {"size": (8, True)}, {"resize": []}, {"flip": "x"}, {"flip": None}, {"flip": True}),
        *({"scale": 0.5}, {"scale": "ab"}, {"scale": (0.5,)}, {"scale": (0.1, 0.5, 1)}, {"scale": ("a", "b")}),
        *({"ratio": None}, {"ratio": 1}, {"ratio": (1, float("inf"))}, {"ratio": (0.5, float("nan"))}),
        *({"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 2)}, {"ratio": (0, 1)}, {"ratio": (2, 1)}),
    ],
)
def test_augmentation_refuses_impossible_settings(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"^{name} .*, got .*; give one such as"):
        RandomResizedCropFlip(**arguments)


def test_augmentation_takes_numbers_of_numpy_and_lists():
    given = RandomResizedCropFlip(np.int64(16), scale=[0.5, np.float32(1)], flip=np.float64(0.5), resize=[20, 24])
    assert given(noise(32, 32)).size == (16, 16)


class TestContinualCollator:
    transform = staticmethod(lambda images: torch.zeros(len(images), 3, 2, 2))

    def examples(self, *labels):
        return [{"image": noise(2, 2), "label": label} for label in labels]

    def test_labels_are_in_the_order_of_the_model(self):
        batch = ContinualCollator(self.transform, np.array([1, -1, 0]))(self.examples(0, 2, np.int64(0)))
        assert batch["labels"].tolist() == [1, 0, 1] and batch["labels"].dtype == torch.int64
        assert batch["pixel_values"].shape == (3, 3, 2, 2) and set(batch) == {"pixel_values", "labels"}

    def test_labels_may_be_names_and_columns_named_otherwise(self):
        collator = ContinualCollator(self.transform, [1, -1, 0], "photo", "kind", label_names=("ant", "bee", "cat"))
        batch = collator([{"photo": noise(2, 2), "kind": kind} for kind in ("cat", "ant")])
        assert batch["labels"].tolist() == [0, 1]

    def test_images_pass_through_the_transform_in_order(self):
        transform = ImageTransform(PROCESSORS["scaled"]())
        examples = [{"image": noise(24, 32, seed), "label": 0} for seed in range(3)]
        expected = transform([example["image"] for example in examples])
        assert torch.equal(ContinualCollator(transform, [0])(examples)["pixel_values"], expected)

    @pytest.mark.parametrize(
        ("label", "shown"), [(1, r"1 \('bee'\)"), (3, "3 "), (-1, "-1 "), ("bee", "'bee'"), ("yak", "'yak'")]
    )
    def test_label_outside_the_scenario_is_refused(self, label, shown):
        collator = ContinualCollator(self.transform, [1, -1, 0], label_names=("ant", "bee", "cat"))
        with pytest.raises(ValueError, match=f"label {shown}.*'label' is not among the 2 classes"):
            collator(self.examples(0, label))

    def test_a_name_needs_the_label_names(self):
        with pytest.raises(ValueError, match="label_names=scenario.label_names"):
            ContinualCollator(self.transform, [0])(self.examples("ant"))
        with pytest.raises(ValueError, match="1 entries but label_names 2"):
            ContinualCollator(self.transform, [0], label_names=("ant", "bee"))

    def test_a_missing_column_points_to_the_trainer_setting(self):
        with pytest.raises(ValueError, match=r"\['label'\], but not 'image'.*remove_unused_columns=False"):
            ContinualCollator(self.transform, [0])([{"label": 0}])
