"""Held-out slides of the cohort: where their lesions were planted, and how well a map finds them."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

LESION = 1  # its index among the classes of the demo's head


def read_csv(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def planted_tiles(cohort: Path, h5: Path) -> npt.NDArray[np.bool_]:
    """Which tiles of a slide's `h5` hold a lesion, bool [N], by the truth in the folder `cohort`."""
    planted = {
        (int(tile["x"]), int(tile["y"]))
        for tile in read_csv(cohort / "tiles.csv")
        if tile["slide_id"] == h5.stem and tile["kind"] == "lesion"
    }
    with h5py.File(h5) as file:
        return np.array([tuple(place) in planted for place in file["coords"][:].tolist()])


def planted_auroc(truth: npt.NDArray[np.bool_], h5: Path, method: str = "partition_shap") -> float:
    """AUROC of the planted tiles by the values that `client attribute` left in `h5` for the lesion."""
    with h5py.File(h5) as file:
        return float(roc_auc_score(truth, file[f"attribution_{method}"][:, LESION]))
