"""Labelled tiles: from folders of images, or from a table of images or of squares in slides."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import openslide
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from gigapath_contract.tables import is_missing
from training.data.tables import SPLITS, Table
from training.errors import TrainingError
from training.models.tile_encoder import TILE_SIZE, centre_crop

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class Tile:
    """A labelled tile: an image file, or a square of a slide (`place` is x, y and side in level-0 px)."""

    image: Path
    label: str
    split: str
    place: tuple[int, int, int] | None = None


def read_list(path: Path) -> list[Tile]:
    """The tiles of a table, or of a folder of images `SPLIT/CLASS/*`, with SPLIT one of train, val, test.

    A table has the columns image (relative to the table's folder), label and split; where an image is a
    slide, also x, y and size: the tile's corner and side in level-0 px.

    Raises:
        TrainingError: no table, a column missing, or a row that cannot be used.
    """
    return _in_folder(path) if path.is_dir() else _in_table(Table(path))


def list_tiles(path: Path) -> list[Tile]:
    """The tiles that `read_list` finds, checked to suffice for training.

    Raises:
        TrainingError: as `read_list`; a split without tiles, or a class without training tiles.
    """
    tiles = read_list(path)
    trained = {tile.label for tile in tiles if tile.split == "train"}
    for split in SPLITS:
        labels = {tile.label for tile in tiles if tile.split == split}
        if not labels:
            raise TrainingError(f"{path} has no {split} tiles: train, val and test each need some")
        if unseen := labels - trained:
            raise TrainingError(f"{path}: class {min(unseen)} has no training tile, so it can't be learnt")
    return tiles


def _in_folder(path: Path) -> list[Tile]:
    return [
        Tile(file, file.parent.name, split)
        for split in SPLITS
        for file in sorted(path.glob(f"{split}/*/*"))
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]


def _in_table(table: Table) -> list[Tile]:
    image, label, split = (table.column(name) for name in ("image", "label", "split"))
    placed = {"x", "y", "size"} <= set(table.columns)
    tiles = []
    for index, row in enumerate(table.rows):
        if is_missing(row[label]) or row[split] not in SPLITS:
            raise TrainingError(f"{table.at(index)} needs a label, and a split out of {', '.join(SPLITS)}")
        try:
            place = (int(row["x"]), int(row["y"]), int(row["size"])) if placed else None
        except ValueError as error:
            raise TrainingError(f"{table.at(index)}: x, y and size must be whole pixels") from error
        tiles.append(Tile(table.path.parent / row[image], row[label], row[split], place))
    return tiles


def read_tile(tile: Tile) -> npt.NDArray[np.uint8]:
    """The model's input, RGB uint8 [224, 224, 3]: the centre of a tile of 256 px.

    An image is resized to 256 px bicubically, a slide's region by area means. Raises TrainingError for a file
    that can't be read.
    """
    try:
        if tile.place is None:
            with Image.open(tile.image) as image:
                rgb = image.convert("RGB")
            scale = TILE_SIZE / min(rgb.size)
            if scale != 1:
                size = (round(rgb.width * scale), round(rgb.height * scale))
                rgb = rgb.resize(size, Image.Resampling.BICUBIC)
            pixels = np.array(rgb)
        else:
            pixels = _read_place(tile.image, *tile.place)
    except (OSError, UnidentifiedImageError, openslide.OpenSlideError) as error:
        raise TrainingError(f"{tile.image} can't be read as a tile: {error}") from error
    return np.ascontiguousarray(centre_crop(torch.from_numpy(pixels)).numpy())


def _read_place(path: Path, x: int, y: int, side: int) -> npt.NDArray[np.uint8]:
    with openslide.OpenSlide(path) as slide:
        level = slide.get_best_level_for_downsample(side / TILE_SIZE)
        size = round(side / slide.level_downsamples[level])
        region = slide.read_region((x, y), level, (size, size)).convert("RGB")
    pixels = np.array(region)
    if size != TILE_SIZE:
        pixels = np.asarray(
            cv2.resize(pixels, (TILE_SIZE, TILE_SIZE), interpolation=cv2.INTER_AREA), np.uint8
        )
    return pixels


class TileImages(Dataset[tuple[Tensor, int]]):
    """(pixels uint8 [224, 224, 3], class index) of some tiles, read on access or, `in_memory`, at once."""

    def __init__(self, tiles: Sequence[Tile], classes: Sequence[str], *, in_memory: bool = False) -> None:
        self.tiles = tiles
        self.classes = classes
        self.targets = [classes.index(tile.label) for tile in tiles]
        self._pixels: list[npt.NDArray[np.uint8]] | None = None
        if in_memory:
            with ThreadPoolExecutor() as pool:
                self._pixels = list(pool.map(read_tile, tiles))

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self._pixels[index] if self._pixels is not None else read_tile(self.tiles[index])
        return torch.from_numpy(pixels), self.targets[index]
