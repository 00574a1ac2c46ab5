"""What the training tests share: slides' embeddings in which a few tiles decide the label."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

SPLIT_OF_PATIENT = ("train", "train", "val", "train", "train", "test")


@pytest.fixture(scope="session")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 slides of 12 patients, 96 wide: `features/` and `labels.csv` (label, split, flags A and B)."""
    root = tmp_path_factory.mktemp("bags")
    (root / "features").mkdir()
    rng = np.random.default_rng(0)
    direction = rng.standard_normal((2, 96)).astype(np.float32)
    rows: list[tuple[Any, ...]] = []
    for number in range(24):
        tiles = int(rng.integers(9, 20))
        features = rng.standard_normal((tiles, 96)).astype(np.float32)
        label, other = number % 2, number // 2 % 2
        features[rng.integers(0, tiles, 3)] += 2 * label * direction[0]
        features[rng.integers(0, tiles, 3)] += 2 * other * direction[1]
        cell = np.stack([np.arange(tiles) % 4, np.arange(tiles) // 4], axis=1)
        with h5py.File(root / "features" / f"s{number:02d}.h5", "w") as file:
            file["features"] = features
            file["coords"] = cell * 256
        patient = number // 2
        rows.append((f"s{number:02d}.svs", f"p{patient}", label, SPLIT_OF_PATIENT[patient % 6], label, other))
    with (root / "labels.csv").open("w", newline="") as table:
        csv.writer(table).writerows([("slide_id", "pat_id", "label", "split", "A", "B"), *rows])
    return root


@pytest.fixture(scope="session")
def config_text(bags: Path) -> str:
    """A configuration for `bags`, on one thread so that a busy machine doesn't slow it."""
    return f"""
preset: demo
task: {{classes: {{benign: 0, lesion: 1}}}}
data: {{features: {bags}/features, labels: {bags}/labels.csv}}
optim: {{epochs: 3, accumulate: 5, base_lr: 0.02, weight_decay: 0.01, dropout: 0.1}}
masks: {{count: 1}}
bootstrap: 20
resources: {{accelerator: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
