"""From images to model input: augmentation and image processor. Needs no torchvision."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .columns import is_count, is_list, is_number
from .draws import drawn_from
from .pixels import options_of, to_rgb


# Draws for one random crop before the central crop is taken instead, as in torchvision.
CROP_ATTEMPTS = 10

# Steps of an image processor that move pixels; the others work on each pixel value by itself.
GEOMETRY_SWITCHES = ("do_resize", "do_center_crop", "do_pad")
VALUE_SWITCHES = ("do_rescale", "do_normalize")


@dataclass(frozen=True)
class RandomResizedCropFlip:
    """Random resized crop and horizontal flip of a PIL image, the training augmentation of L2P, DualPrompt and CODA.

    A crop of a random share of the area and a random aspect ratio is scaled to `size` (Szegedy et al. 2015, "Going
    deeper with convolutions", section 6), then mirrored with probability `flip`. Crop and scaling are one bicubic
    resampling; at the rim of the crop the filter still sees the pixels outside it. All randomness comes from torch's
    global generator, the same number of draws for every image, so the random state that the Trainer saves governs it.

    Args:
        size: Height and width of the result in pixels, or one number for both. `None`: the output size of the
            processor if used in an `ImageTransform`, otherwise the image's own size.
        scale: Smallest and largest share of the area to crop, in (0, 1].
        ratio: Smallest and largest width/height of the crop, drawn on a logarithmic scale.
        flip: Probability of the flip, 0 to 1.
        resize: Height and width (or one number for both) to scale the whole image to before cropping. L2P and
            DualPrompt use 256 with `size=224`, CODA-Prompt nothing.

    Raises:
        ValueError: A size below 1, a range that is none, empty, reversed or out of bounds, or no probability.

    Example:
        >>> RandomResizedCropFlip(size=224, resize=256)(Image.new("RGB", (32, 32))).size
        (224, 224)
    """

    size: int | tuple[int, int] | None = None
    scale: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    resize: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("size", "resize"):
            value = getattr(self, name)
            sides = (1, 1) if value is None else tuple(value) if is_list(value) else (value, value)
            if len(sides) != 2 or not all(map(is_count, sides)):
                raise ValueError(
                    f"{name} must be a number of pixels of at least 1 or (height, width), got {value!r}; give one "
                    "such as 224."
                )
        if not _is_range(self.scale) or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale must be (low, high) with 0 < low <= high <= 1, got {self.scale!r}; give one such as (0.05, 1)."
            )
        if not _is_range(self.ratio) or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(
                f"ratio must be (low, high) of width/height with 0 < low <= high, got {self.ratio!r}; give one such "
                "as (0.75, 1.33)."
            )
        if not is_number(self.flip) or not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability from 0 to 1, got {self.flip!r}; give one such as 0.5.")

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.resize is not None:
            height, width = _sides(self.resize)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        height, width = (image.height, image.width) if self.size is None else _sides(self.size)
        draws = torch.rand(2 * CROP_ATTEMPTS + 3).tolist()
        box = self._crop(image.width, image.height, draws)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[-1] < self.flip else image

    def _crop(self, width: int, height: int, draws: list[float]) -> tuple[int, int, int, int]:
        """Returns (left, top, right, bottom) of the crop in pixels."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(CROP_ATTEMPTS):
            share = self.scale[0] + draws[2 * attempt] * (self.scale[1] - self.scale[0])
            aspect = math.exp(low + draws[2 * attempt + 1] * (high - low))
            crop_width = round(math.sqrt(share * width * height * aspect))
            crop_height = round(math.sqrt(share * width * height / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(draws[-3] * (width - crop_width + 1))
                top = int(draws[-2] * (height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        # No crop fitted (a very long image, or a share near 1): the largest central one with an allowed ratio.
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_width = max(1, min(width, round(height * aspect)))
        crop_height = max(1, min(height, round(width / aspect)))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height


class ImageTransform:
    """Turns PIL images into the model's `pixel_values`: to RGB, the augmentation, the Hugging Face image processor.

    The result is bit for bit the processor's, but where possible computed by a direct path, several times cheaper:
    after cropping and scaling, a processor only maps each channel value 0..255 to a number, so its answers for the
    256 values are kept and looked up. Whether the direct path gives the processor's result is tried on noise images
    when the transform is made; if not, the processor is called for every batch. The processor's settings are read
    at that time too: after changing them, make a new transform.

    An augmentation that ends at the processor's output size has settled the geometry: only the values are still
    mapped, and a processor that scales to 256 and crops 224 does not crop the augmented image again.

    Args:
        processor: A Hugging Face image processor, or a processor that holds one as `image_processor`.
        augmentation: Callable from an RGB PIL image to a PIL image, applied per image, for training;
            `RandomResizedCropFlip` without a size takes the processor's. Picklable if workers are spawned.
            An image of any mode becomes RGB before it, as `to_rgb` says; the processor's attributes `image_background`
            and `image_white`, if it has them, are the options of that.

    Attributes:
        output_size: (height, width) of the processor's result, `None` if it depends on the image.
        digest: of what becomes of three images of noise, and of one of each kind of mode: other code of the processor
            is another processor.

    Raises:
        ValueError: The processor does not give `pixel_values` of shape (images, 3, height, width), or has no fixed
            output size for an augmentation that has none either.

    Example:
        >>> transform = ImageTransform(AutoImageProcessor.from_pretrained("google/vit-base-patch16-224-in21k"))
        >>> transform([Image.new("L", (32, 32))]).shape
        torch.Size([1, 3, 224, 224])
    """

    def __init__(
        self, processor: Callable[..., Any], augmentation: Callable[[Image.Image], Image.Image] | None = None
    ) -> None:
        self.processor = getattr(processor, "image_processor", processor)
        self._pixels = options_of(self.processor)
        # Its own generator: making a transform leaves the global random states alone.
        generator = np.random.default_rng(0)
        probes = [
            Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
            for height, width in ((48, 80), (320, 240), (900, 1000))
        ]
        answers = [self._process([probe]) for probe in probes]
        half_seen = Image.merge("RGBA", (*probes[0].split(), probes[0].getchannel(0)))
        modes = [self.to_rgb(half_seen), *(self.to_rgb(probes[0].convert(mode)) for mode in ("I;16", "I", "F"))]
        made = [*(answer.contiguous().numpy() for answer in answers), *map(np.asarray, modes)]
        self.digest = hashlib.sha256(b"".join(each.tobytes() for each in made)).hexdigest()
        sizes = {tuple(answer.shape[-2:]) for answer in answers}
        self.output_size: tuple[int, int] | None = sizes.pop() if len(sizes) == 1 else None
        self._table = self._table_of_values(probes)
        self._table_on_device: torch.Tensor | None = None
        self._scaling_is_all = self._table is not None and self._scaling_gives(probes, answers)
        if isinstance(augmentation, RandomResizedCropFlip) and augmentation.size is None:
            if self.output_size is None:
                raise ValueError(
                    f"The output size of {type(self.processor).__name__} depends on the image, so the augmentation "
                    "needs its own: give RandomResizedCropFlip(size=...)."
                )
            augmentation = dataclasses.replace(augmentation, size=self.output_size)
        self.augmentation = augmentation

    def __call__(self, images: Sequence[Image.Image], seeds: Sequence[int] | None = None) -> torch.Tensor:
        """Returns the `pixel_values` of the images.

        Args:
            images: At least one PIL image, of any mode and size.
            seeds: One for each image, from which its augmentation draws, whatever generator it uses (Python's,
                NumPy's, torch's on the CPU); their states are left as they were. `None`: it draws from these as they
                are.

        Returns:
            float32 tensor of shape (images, 3, height, width), contiguous.

        Raises:
            TypeError: Something in the list is no PIL image.
            ValueError: No images, or the processor gives images of several sizes that do not make one tensor.
        """
        if len(images) == 0:
            raise ValueError("An empty list of images makes no batch; give at least one image.")
        images = [self.to_rgb(image) for image in images]
        if self.augmentation is not None:
            images = [
                self.to_rgb(self.augmented(image, None if seeds is None else seeds[place]))
                for place, image in enumerate(images)
            ]
        if self._table is not None and (self._scaling_is_all or self._settled(images)):
            return self._look_up(images, self._table)
        return self._process(images)

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """Returns an image of any mode as RGB, by the options that the processor carries."""
        return to_rgb(image, **self._pixels)

    def _settled(self, images: list[Image.Image]) -> bool:
        return self.augmentation is not None and all((i.height, i.width) == self.output_size for i in images)

    def _process(self, images: list[Image.Image], **switches: bool) -> torch.Tensor:
        name = type(self.processor).__name__
        try:
            values = self.processor(images=images, return_tensors="pt", **switches)["pixel_values"]
        except ValueError as error:
            sizes = sorted({image.size for image in images})
            raise ValueError(
                f"{name} cannot make one batch of images with the sizes (width, height) {sizes[:5]}. If the sizes are "
                f"the cause, set a fixed one in the processor, or give an augmentation with a size. It says: {error}"
            ) from error
        if values.ndim != 4 or values.shape[1] != 3:
            raise ValueError(
                f"{name} gives pixel_values of shape {tuple(values.shape)}, but (images, 3, height, width) is needed; "
                "use an image processor of a vision model with fixed patches, such as ViTImageProcessor."
            )
        return values.float()

    def _table_of_values(self, probes: list[Image.Image]) -> np.ndarray | None:
        """Returns the processor's answers to the channel values, float32 of shape (3, 256), or `None` without any."""
        if self.output_size is None:
            return None
        switches = {name: False for name in GEOMETRY_SWITCHES if getattr(self.processor, name, False)}
        values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
        height, width = self.output_size
        fitting = [probe.resize((width, height)) for probe in probes]
        try:
            table = self._process([Image.fromarray(values)], **switches)
            answers = self._process(fitting, **switches)
        except (TypeError, ValueError):
            # A processor of another make that cannot leave out a step: it is simply called for every batch.
            return None
        if table.shape[-2:] != (16, 16) or answers.shape[-2:] != self.output_size:
            return None
        table = table[0].reshape(3, 256).numpy()
        return table if torch.equal(self._look_up(fitting, table), answers) else None

    def _scaling_gives(self, probes: list[Image.Image], answers: list[torch.Tensor]) -> bool:
        """Whether scaling to the output size is all that the processor does to an image's geometry."""
        if getattr(self.processor, "resample", None) is None:
            return False
        direct = [self._look_up([probe], self._table) for probe in probes]
        return all(torch.equal(*pair) for pair in zip(direct, answers, strict=True))

    def augmented(self, image: Image.Image, seed: int | None) -> Image.Image:
        """Returns the augmentation of an RGB image, drawn from `seed` as in `__call__`."""
        with nullcontext() if seed is None else drawn_from(seed):
            return self.augmentation(image)

    @property
    def has_bytes(self) -> bool:
        """Whether what the processor makes of an image is its scaled bytes with a number for each value."""
        if self._table is None:
            return False
        probe = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 80, 3), dtype=np.uint8))
        try:
            return torch.equal(self.from_bytes(self.to_bytes([probe])), self._process([probe]))
        except (TypeError, ValueError):
            return False

    def to_bytes(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Returns the images scaled (and cropped) as the processor does it, un-augmented: (images, 3, height, width)
        uint8."""
        images = [self.to_rgb(image) for image in images]
        if self._scaling_is_all:
            return torch.from_numpy(self._scaled(images))
        switches = {name: False for name in VALUE_SWITCHES if hasattr(self.processor, name)}
        return self._process(images, **switches).round().clamp(0, 255).byte()

    def from_bytes(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the `pixel_values` of what `to_bytes` gave, on the same device, without Python for each image."""
        if images.device.type == "cpu":
            return self._mapped(images.numpy(), self._table)
        if self._table_on_device is None or self._table_on_device.device != images.device:
            self._table_on_device = torch.from_numpy(self._table).to(images.device)
        values = zip(self._table_on_device, images.int().unbind(1), strict=True)
        return torch.stack([table[channel] for table, channel in values], dim=1)

    def _look_up(self, images: list[Image.Image], table: np.ndarray) -> torch.Tensor:
        return self._mapped(self._scaled(images), table)

    def _scaled(self, images: list[Image.Image]) -> np.ndarray:
        height, width = self.output_size
        scaled = np.empty((len(images), 3, height, width), dtype=np.uint8)
        for index, image in enumerate(images):
            if image.size != (width, height):
                image = image.resize((width, height), resample=self.processor.resample)
            scaled[index] = np.asarray(image).transpose(2, 0, 1)
        return scaled

    @staticmethod
    def _mapped(scaled: np.ndarray, table: np.ndarray) -> torch.Tensor:
        values = np.empty(scaled.shape, dtype=np.float32)
        for channel in range(3):
            # "clip" has nothing to clip in 0..255, but writes straight into the result; "raise" makes a copy.
            np.take(table[channel], scaled[:, channel], out=values[:, channel], mode="clip")
        return torch.from_numpy(values)


def _is_range(value: object) -> bool:
    return is_list(value) and len(value) == 2 and all(map(is_number, value))


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return tuple(size) if is_list(size) else (size, size)
