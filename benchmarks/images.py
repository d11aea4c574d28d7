"""Labelled images: real ones that come with packages, and loaders for data sets that one has.

Without a network there is no ImageNet. scikit-learn brings 1797 handwritten digits; scikit-image
and scikit-learn bring photographs, of which crops make a task: which photograph is it from? Both
are stand-ins and are called so. The packages' files are read, the packages are not imported.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = ("train", "test")
CROP = 64  # pixels
# Crops come from cells of the photographs, and lie within one; a third of the cells is for tests.
CELL = 96
PHOTOGRAPHS = {
    "skimage/data": (
        "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png",
        "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
        "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}  # fmt: skip
CIFAR_C_IMAGES = 10_000  # of each severity in a file of CIFAR-100-C


class ImagesNotFound(RuntimeError):
    """A data set is not on this machine; the message says how to get it."""


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory.

    Attributes:
        name: of the data set.
        images: (n, 3, h, w) uint8.
        labels: (n,) int64.
        classes: names of the labels.
        masks: (n, h, w) bool, the object that the label is of, where it is known.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        masks = None if self.masks is None else self.masks.to(device)
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels, masks=masks)


def digits(split: str, size: int = CROP) -> Images:
    """scikit-learn's handwritten digits, 8 x 8 pixels scaled up; the last fifth is for tests."""
    _check_split(split)
    file = _data_file("sklearn", "datasets/data", "digits.csv.gz")
    with gzip.open(file, "rt") as lines:
        table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.float32))
    first = len(table) * 4 // 5  # the writers of the last ones wrote none of the others
    table = table[:first] if split == "train" else table[first:]
    small = table[:, :-1].view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size, mode="bicubic").clamp(0, 1)
    images = (255 * large).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return Images("digits", images.contiguous(), table[:, -1].long(), tuple("0123456789"))


def photographs(split: str, count: int, seed: int = 0) -> Images:
    """``count`` grey crops of 64 pixels; the label is the photograph. No pixel is in both splits.

    The photographs are cut into cells, every third of which is for tests, and crops lie anywhere
    within one cell. Grey, since colours alone would tell most of the photographs.
    """
    _check_split(split)
    generator = torch.Generator().manual_seed(2 * seed + SPLITS.index(split))
    names, cells = [], []
    for folder, files in PHOTOGRAPHS.items():
        package, _, inner = folder.partition("/")
        for file in files:
            image = _read(_data_file(package, inner, file), grey=True)
            names.append(file.partition(".")[0])
            cells.append([c for c, is_test in _cells(image) if is_test == (split == "test")])
    labels = torch.arange(count) % len(names)
    crops = torch.empty(count, CROP, CROP, dtype=torch.uint8)
    draws = torch.rand(count, 3, generator=generator)
    for crop, label, draw in zip(crops, labels.tolist(), draws.tolist(), strict=True):
        own = cells[label]
        cell = own[int(draw[0] * len(own))]
        y, x = (int(u * (side - CROP + 1)) for u, side in zip(draw[1:], cell.shape, strict=True))
        crop.copy_(cell[y : y + CROP, x : x + CROP])
    images = crops[:, None].expand(-1, 3, -1, -1).contiguous()
    return Images("photographs", images, labels, tuple(names))


def _cells(image: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The cells (96, 96) of an image (1, h, w), and whether each is for tests."""
    for i in range(image.shape[1] // CELL):
        for j in range(image.shape[2] // CELL):
            rows, columns = (slice(k * CELL, (k + 1) * CELL) for k in (i, j))
            yield image[0, rows, columns], (i + j) % 3 == 0


def image_folder(root: Path, split: str, size: int = CROP) -> Images:
    """Images as ImageNet is laid out, ``root/split/class/file``: the middle square, scaled."""
    folders = sorted(f for f in (root / split).glob("*") if f.is_dir())
    if not folders:
        raise ImagesNotFound(f"{root / split} has no folders, one for each class")
    images, labels = [], []
    for label, folder in enumerate(folders):
        for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES):
            images.append(_read(file, size=size))
            labels.append(label)
    classes = tuple(folder.name for folder in folders)
    return Images(root.name, torch.stack(images), torch.tensor(labels), classes)


_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


def cifar100(root: Path, split: str) -> Images:
    """CIFAR-100 in its "python version", whose files are ``train``, ``test`` and ``meta``."""
    _check_split(split)
    data, meta = (_unpickle(root / name) for name in (split, "meta"))
    images = torch.from_numpy(data[b"data"]).view(-1, 3, 32, 32)
    classes = tuple(name.decode() for name in meta[b"fine_label_names"])
    return Images("CIFAR-100", images, torch.tensor(data[b"fine_labels"]), classes)


def cifar100_c(root: Path) -> dict[str, list[Images]]:
    """CIFAR-100-C by corruption: the images of each severity, from ``labels.npy`` and others."""
    files = [file for file in sorted(root.glob("*.npy")) if file.stem != "labels"]
    if not files or not (root / "labels.npy").exists():
        raise ImagesNotFound(f"{root} has no labels.npy beside other .npy files")
    every_label = torch.from_numpy(np.load(root / "labels.npy")).long()
    size = min(CIFAR_C_IMAGES, len(every_label) // 5)
    found = {}
    for file in files:
        every = torch.from_numpy(np.load(file)).permute(0, 3, 1, 2).contiguous()
        parts = zip(every.split(size), every_label.split(size), strict=True)
        found[file.stem] = [Images("CIFAR-100-C", x, labels, ()) for x, labels in parts]
    return found


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


def _data_file(package: str, folder: str, name: str) -> Path:
    spec = find_spec(package)
    for root in (spec.submodule_search_locations if spec else None) or []:
        if (Path(root) / folder / name).is_file():
            return Path(root) / folder / name
    raise ImagesNotFound(
        f"{name} is a file of {package}, which is not installed: "
        "pip install 'entropy-attn[experiments]'"
    )


def _read(file: Path, size: int | None = None, grey: bool = False) -> Tensor:
    """(1 or 3, h, w) uint8; with a size, the middle square scaled to it."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        shown = image.convert("L" if grey else "RGB")
        if size is not None:
            shown = ImageOps.fit(shown, (size, size), Image.Resampling.BICUBIC)
        array = np.array(shown)
    return torch.from_numpy(array)[None] if grey else torch.from_numpy(array).permute(2, 0, 1)


class _ArraysOnly(pickle.Unpickler):
    """Reads CIFAR's pickles, which hold arrays, lists and text, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if is_array or (module, name) == ("_codecs", "encode"):  # how Python 3 writes their bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set")


def _unpickle(path: Path) -> dict[bytes, Any]:
    if not path.is_file():
        raise ImagesNotFound(f"{path} is missing: CIFAR-100 has it in its python version")
    file: IO[bytes]
    with path.open("rb") as file:
        return _ArraysOnly(file, encoding="bytes").load()
