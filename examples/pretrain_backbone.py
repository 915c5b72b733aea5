"""Pretrain a small ViT from scratch: the recipe for a backbone like the embedded `peft_cl/assets/vit-tiny-64`.

Supervised, on one GPU or a CPU, without a data loader: the images are small enough to stay as bytes in the device's
memory, and all augmentation is done there, a batch at a time. What is saved is a moving average of the weights.

    python examples/pretrain_backbone.py --data path/to/images --output vit-tiny-64 --compile     # minutes on a GPU
    python examples/pretrain_backbone.py --data path/to/images --output vit-tiny-64 --epochs 24 --batch-size 256 \\
        --small-part 0.62 --cutmix 0 --erase 0                                                    # hours on a CPU

`--data` is a folder that `datasets.load_dataset` reads (an image folder, or parquet files) with the columns `image`
and `label`, a `train` split and a `test` or `validation` split.
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from torch.distributions import Beta
from torch.nn import functional as F
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

from peft_cl.assets import default_backbone


IMAGE_SIZE = 64
SMALL_IMAGE_SIZE = 48  # a multiple of the patch size, used for the first part of training: 44% fewer patches


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of images, as load_dataset takes it")
    parser.add_argument("--output", default="vit-tiny-64", help="folder to save the model and its processor in")
    parser.add_argument("--epochs", type=int, default=300, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=512, help="images in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, default=400, help="steps of warm-up, at most a tenth of all")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="not for biases and embeddings")
    parser.add_argument("--smallest-crop", type=float, default=0.35, help="part of the area that a crop has at least")
    parser.add_argument("--rotation", type=float, default=0.0, help="degrees at most, either way")
    parser.add_argument("--jitter", type=float, default=0.4, help="of brightness, contrast and saturation, at most")
    parser.add_argument("--erase", type=float, default=0.25, help="probability that a box of the image is erased")
    parser.add_argument("--mixup", type=float, default=0.2, help="alpha of mixup's Beta distribution; 0 turns it off")
    parser.add_argument("--cutmix", type=float, default=1.0, help="the same of cutmix; with both, they take turns")
    parser.add_argument("--label-smoothing", type=float, default=0.1, help="part of a target spread over all classes")
    parser.add_argument("--average-decay", type=float, default=0.999, help="of the moving average of the weights")
    parser.add_argument("--small-part", type=float, default=0.0, help=f"part of the steps at {SMALL_IMAGE_SIZE} px")
    parser.add_argument("--limit", type=int, help="train on this many random images only (a trial)")
    parser.add_argument("--measure-every", type=int, default=10, help="epochs between two measurements")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the order and the augmentation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    parser.add_argument("--compile", action="store_true", help="compile model and augmentation with torch.compile")
    return parser.parse_args()


def load_images(split: Dataset, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every image, uint8 (N, 3, 64, 64), and every label, int64 (N,), on the device."""
    pixels = np.empty((len(split), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for index, image in enumerate(split["image"]):
        image = image.convert("RGB")
        if image.size != (IMAGE_SIZE, IMAGE_SIZE):
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pixels[index] = np.asarray(image)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.tensor(split["label"][:], device=device)


def build_model(class_names: list[str]) -> ViTForImageClassification:
    """Return a randomly initialised ViT of 2.7 M parameters with a head for these classes."""
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        layer_norm_eps=1e-5,
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
    )
    return ViTForImageClassification(config)


def to_pixel_values(images: torch.Tensor) -> torch.Tensor:
    """Map bytes 0..255 to -1..1, as the processor saved with the model does (mean and standard deviation 0.5)."""
    return images.float() / 127.5 - 1


def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A number between `low` and `high` for each image of a batch, (B,)."""
    return torch.empty(len(like), device=like.device).uniform_(low, high)


def random_crop_and_flip(images: torch.Tensor, size: int, smallest: float, degrees: float) -> torch.Tensor:
    """Crop each image to a random box, turn it, flip half of them, and resize all to (B, 3, size, size), in one
    sampling.

    A box covers `smallest` to all of the area with a width-to-height ratio of 3:4 to 4:3, as in random-resized-crop.
    """
    area = uniform(images, smallest, 1)
    ratio = uniform(images, -math.log(4 / 3), math.log(4 / 3)).exp()
    # To affine_grid the image spans -1..1: a box of width w (a part of 1) has its centre within +-(1 - w).
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    flip = uniform(images, -1, 1).sign()
    angle = uniform(images, -1, 1) * math.radians(degrees)
    across, down = (1 - width) * uniform(images, -1, 1), (1 - height) * uniform(images, -1, 1)
    rows = [
        torch.stack([width * flip * angle.cos(), -height * angle.sin(), across], dim=1),
        torch.stack([width * flip * angle.sin(), height * angle.cos(), down], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [len(images), 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def jitter(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Change saturation, contrast and brightness of each image, each by a factor of 1 - strength to 1 + strength."""
    factors = [uniform(images, 1 - strength, 1 + strength)[:, None, None, None] for _ in range(3)]
    images = images.mean(dim=1, keepdim=True).lerp(images, factors[0])
    images = images.mean(dim=(1, 2, 3), keepdim=True).lerp(images, factors[1])
    return (images + 1) * factors[2] - 1  # black is -1


def random_boxes(images: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """A square of `area`, (B,) parts of the image, at a random place in each: (B, 1, H, W), True inside."""
    height, width = images.shape[-2:]
    ends = []
    for size in (height, width):
        places = (torch.arange(size, device=images.device) + 0.5) / size
        centre, half = uniform(images, 0, 1)[:, None], area.sqrt()[:, None] / 2
        ends.append((places - centre).abs() <= half)
    return (ends[0][:, :, None] & ends[1][:, None, :])[:, None]


def augment(
    images: torch.Tensor, size: int, smallest_crop: float, rotation: float, strength: float, erase: float
) -> torch.Tensor:
    """Bytes (B, 3, H, W) -> augmented pixels (B, 3, size, size)."""
    pixels = random_crop_and_flip(to_pixel_values(images), size, smallest_crop, rotation)
    pixels = jitter(pixels, strength)
    chosen = uniform(pixels, 0, 1) < erase
    boxes = random_boxes(pixels, uniform(pixels, 0.02, 0.3)) & chosen[:, None, None, None]
    return torch.where(boxes, torch.randn_like(pixels), pixels)


def blend(
    pixels: torch.Tensor, targets: torch.Tensor, partner: torch.Tensor, share: torch.Tensor, cut: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each image and its target distribution (B, classes) a share, (B,), of its partner, (B,), in the batch.

    By cutmix (Yun et al., 2019, equation 1) if `cut`, else by mixup (Zhang et al., 2018, equation 1).
    """
    if cut:
        inside = random_boxes(pixels, share)
        share = inside.float().mean(dim=(1, 2, 3))
        pixels = torch.where(inside, pixels[partner], pixels)
    else:
        pixels = pixels.lerp(pixels[partner], share[:, None, None, None])
    return pixels, targets.lerp(targets[partner], share[:, None])


def build_optimizer(model: ViTForImageClassification, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW that decays the matrices and leaves biases, norms, the CLS token and the positions alone."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_embedding = name.endswith(("cls_token", "position_embeddings"))
        (free if parameter.ndim == 1 or is_embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int, decay: float) -> None:
    """Move the averaged weights towards the model's; early on by more, so that the random start is soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


@torch.inference_mode()
def top1_accuracy(model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images whose highest logit is their label's, computed in float32."""
    correct = 0
    for image_batch, label_batch in zip(images.split(500), labels.split(500), strict=True):
        correct += (model(to_pixel_values(image_batch)).logits.argmax(-1) == label_batch).sum().item()
    return correct / len(labels)


def train(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    dataset = load_dataset(arguments.data)
    train_split, test_split = dataset["train"], dataset["test" if "test" in dataset else "validation"]
    class_names = train_split.features["label"].names
    if arguments.limit is not None:
        train_split = train_split.shuffle(seed=arguments.seed).select(range(min(arguments.limit, len(train_split))))
    images, labels = load_images(train_split, device)
    test_images, test_labels = load_images(test_split, device)
    one_hot = torch.eye(len(class_names), device=device)

    model = build_model(class_names).to(device)
    average = copy.deepcopy(model).eval()
    forward, prepare, mix = model, augment, blend
    if arguments.compile:
        # The steps are short: on a GPU, launching kernels one by one would take longer than running them.
        forward = torch.compile(model, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
        prepare, mix = torch.compile(augment, dynamic=False), torch.compile(blend, dynamic=False)
    batch_size = min(arguments.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    total_steps = steps_per_epoch * arguments.epochs
    optimizer = build_optimizer(model, arguments.learning_rate, arguments.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(arguments.warmup_steps, total_steps // 10), total_steps)
    # Without validation: it would wait for the device at each step.
    blends = [
        (cut, Beta(*torch.full((2,), alpha, device=device), validate_args=False))
        for cut, alpha in ((False, arguments.mixup), (True, arguments.cutmix))
        if alpha
    ]
    strengths = arguments.smallest_crop, arguments.rotation, arguments.jitter, arguments.erase
    print(f"{len(images)} images of {len(class_names)} classes, {total_steps} steps on {device}", flush=True)

    step, started = 0, time.perf_counter()
    for epoch in range(1, arguments.epochs + 1):
        order = torch.randperm(len(images), device=device)[: steps_per_epoch * batch_size]
        for chosen in order.split(batch_size):
            size = SMALL_IMAGE_SIZE if step < arguments.small_part * total_steps else IMAGE_SIZE
            pixel_values, targets = prepare(images[chosen], size, *strengths), one_hot[labels[chosen]]
            if blends:
                cut, shares = blends[step % len(blends)]
                partner, share = torch.randperm(batch_size, device=device), shares.sample((batch_size,))
                pixel_values, targets = mix(pixel_values, targets, partner, share, cut)
            with torch.autocast(device.type, torch.bfloat16):
                logits = forward(pixel_values, interpolate_pos_encoding=size != IMAGE_SIZE).logits
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=arguments.label_smoothing)
            loss.backward()  # without clipping: compiled on a GPU (torch 2.11), training with it hardly learnt
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            update_average(average, model, step, arguments.average_decay)
            step += 1
        if epoch % arguments.measure_every == 0 or epoch == arguments.epochs:
            accuracy, seconds = top1_accuracy(average, test_images, test_labels), time.perf_counter() - started
            print(f"epoch {epoch}: loss {loss:.3f}, top-1 {accuracy:.2%}, {size} px, {seconds:.0f} s", flush=True)

    # What is saved is what is measured: the last figure is that of the weights as rounded to float16.
    average.half().save_pretrained(arguments.output)
    # Half of the bytes, but float32 is what it computes in unless a user says otherwise: float16 is slow on a CPU.
    average.config.dtype = torch.float32
    average.config.save_pretrained(arguments.output)
    AutoImageProcessor.from_pretrained(default_backbone()).save_pretrained(arguments.output)
    accuracy = top1_accuracy(average.float(), test_images, test_labels)
    print(f"saved in {arguments.output}: top-1 {accuracy:.2%} on {len(test_labels)} test images (float16 weights)")


if __name__ == "__main__":
    train(parse_arguments())
