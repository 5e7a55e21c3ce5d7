"""Folders of images, one folder a class -> normalized pixels; crops follow from seed, epoch and index."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qrecipes.data.batch import IGNORE, Batch
from qrecipes.data.order import Item
from qrecipes.errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue in [0, 1], which most pretrained models expect."""
CENTER = 0.875
"""Share of the shorter side that a validation crop keeps: 224 of 256 pixels."""
CROP_AREA = (0.08, 1.0)
"""Share of the area that a random crop keeps; with CROP_ASPECT as in Inception (arXiv 1409.4842, 6)."""
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
"""Draws of area and aspect before the largest centered crop is taken instead."""


@dataclass(frozen=True)
class LabeledImages:
    """Files with the number of their class, in the order of classes and names."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    folder: Path

    def select(self, indices: Sequence[int]) -> LabeledImages:
        """The images at `indices`, under the same classes."""
        paths = tuple(self.paths[i] for i in indices)
        return LabeledImages(paths, tuple(self.labels[i] for i in indices), self.classes, self.folder)


def list_images(folder: Path, key: str, classes: tuple[str, ...] | None = None) -> LabeledImages:
    """The images below `folder`, whose sorted sub-folders are the classes.

    Hidden files, and those that do not end in one of SUFFIXES, are no images. `classes` are those of the
    training images, which held-out ones must share.

    Raises:
        DataError: if there is no such folder, it has no sub-folders, or one of them is empty or of no known
        class.
    """
    if not folder.is_dir():
        raise DataError(
            f"{key}: {folder} is no folder; images lie in one folder for each class, FOLDER/CLASS/NAME.jpg"
        )
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise DataError(f"{key}: {folder} has no classes; put the images into one sub-folder for each class")
    classes = classes or tuple(path.name for path in found)
    strangers = [path.name for path in found if path.name not in classes]
    if strangers:
        raise DataError(
            f"{key}: {folder}: class {strangers[0]!r} is not among the {len(classes)} training classes"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for subfolder in found:
        images = sorted(path for path in subfolder.rglob("*") if _is_image(path))
        if not images:
            raise DataError(
                f"{key}: {subfolder} holds no images; expected {', '.join(SUFFIXES)}, or remove the folder"
            )
        paths += images
        labels += [classes.index(subfolder.name)] * len(images)
    return LabeledImages(tuple(paths), tuple(labels), classes, folder)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def hold_out(images: LabeledImages, fraction: float) -> tuple[LabeledImages, LabeledImages]:
    """Training and held-out images: of each class the last `fraction` is held out.

    Raises:
        DataError: if a class would have none left to train on, or nothing would be held out.
    """
    counts = np.bincount(images.labels, minlength=len(images.classes))
    held_out = np.round(counts * fraction).astype(int)
    if held_out.sum() == 0 or (held_out >= counts).any():
        raise DataError(
            f"data.validation_fraction: {fraction} of {counts.min()} to {counts.max()} images a class leaves "
            "nothing to "
            "hold out or a class without training images; change it, or name data.validation_files"
        )
    last = np.cumsum(counts)  # images are sorted by class
    is_held_out = [i >= last[label] - held_out[label] for i, label in enumerate(images.labels)]
    training = [i for i, out in enumerate(is_held_out) if not out]
    return images.select(training), images.select([i for i, out in enumerate(is_held_out) if out])


class ImageFolder:
    """Labeled images as normalized squares of `size` pixels; with a seed, randomly cropped and flipped.

    Raises:
        ConfigError: if Pillow is not installed.
    """

    def __init__(self, images: LabeledImages, *, size: int, augment_seed: int | None) -> None:
        _require_pillow()
        self.images = images
        self.size = size
        self.augment_seed = augment_seed
        self.num_items = len(images.paths)
        # Pillow lets go of the interpreter while it decodes and resizes.
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "images")

    def read(self, items: Sequence[Item | None]) -> Batch:
        """The images and their classes.

        Raises:
            DataError: naming the file that is no image.
        """
        inputs = torch.zeros(len(items), 3, self.size, self.size)
        targets = torch.full((len(items),), IGNORE, dtype=torch.int64)
        rows = [(row, item) for row, item in enumerate(items) if item is not None]
        pixels = self._pool.map(self._pixels, (item for _, item in rows))
        for (row, item), image in zip(rows, pixels, strict=True):
            inputs[row] = image
            targets[row] = self.images.labels[item.index]
        return Batch(inputs, targets)

    def max_token(self) -> int:
        """Largest number of a class."""
        return len(self.images.classes) - 1

    def describe(self) -> str:
        """Counts of images and classes, and where they are."""
        return f"{self.num_items:,} images in {len(self.images.classes):,} classes from {self.images.folder}"

    def _pixels(self, item: Item) -> Tensor:
        """[3, size, size], float32."""
        from PIL import Image

        path = self.images.paths[item.index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{path}: not an image that can be read ({error}); replace or remove it"
            ) from error
        generator = None
        if self.augment_seed is not None:
            generator = np.random.default_rng([self.augment_seed, item.epoch, item.index])
        box = center_crop(*image.size) if generator is None else random_crop(*image.size, generator)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image, np.float32) / 255
        if generator is not None and generator.random() < 0.5:
            pixels = pixels[:, ::-1]
        normalized = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))


Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


def center_crop(width: int, height: int) -> Box:
    """The centered square of CENTER times the shorter side."""
    side = CENTER * min(width, height)
    return _centered(width, height, side, side)


def random_crop(width: int, height: int, generator: np.random.Generator) -> Box:
    """A rectangle of random area, aspect and place; else the largest centered one of an allowed aspect."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(*CROP_AREA)
        aspect = math.exp(generator.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
            return left, top, left + w, top + h
    w = min(width, height * CROP_ASPECT[1])
    return _centered(width, height, w, min(height, w / CROP_ASPECT[0]))


def _centered(width: int, height: int, w: float, h: float) -> Box:
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError(
            'data.source: "images" needs Pillow, which is not installed; install qrecipes[vision]'
        ) from error
