"""The classification head on the slide embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn

from gigapath_contract.probabilities import HeadKind
from training.errors import TrainingError


@dataclass(frozen=True)
class HeadConfig:
    """Class names and how their logits are to be read: softmax (`multiclass`) or a sigmoid each.

    `binary` is one logit, that of the one class named.
    """

    classes: tuple[str, ...]
    kind: HeadKind = "multiclass"

    def __post_init__(self) -> None:
        if self.kind not in get_args(HeadKind):
            raise TrainingError(f"head kind {self.kind!r}; it can be {' or '.join(get_args(HeadKind))}")
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise TrainingError(f"head classes {list(self.classes)} must be at least one, each once")
        if (self.kind == "binary") != (len(self.classes) == 1):
            raise TrainingError(f"a {self.kind} head can't have {len(self.classes)} classes")


class ClassificationHead(nn.Module):
    """One linear layer, under the published key `classifier.0`."""

    def __init__(self, embed_dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = nn.Sequential(nn.Linear(embed_dim, len(config.classes)))

    def forward(self, vector: Tensor) -> Tensor:
        """Slide embeddings [..., E] to logits [..., C]."""
        logits: Tensor = self.classifier(vector)
        return logits
