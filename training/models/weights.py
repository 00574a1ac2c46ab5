"""Weights from a file or a hub repository into a model, strictly; and their digest."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from training.errors import TrainingError

StateDict = dict[str, Tensor]

UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)
"""Errors of the two libraries for a damaged, truncated or other file."""

SLIDE_PREFIX = "slide_encoder."
HEAD_KEYS = ("classifier.0.weight", "classifier.0.bias")
LISTED = 12
"""Number of keys of a kind that an error lists."""


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a `.pth`, `.bin`, `.pt` or `.safetensors` file, out of a `{"model": ...}` if in one.

    Pickles are read with `weights_only=True`. Raises a `TrainingError` for a missing, damaged or unfit file.
    """
    if not path.is_file():
        raise TrainingError(f"no weights file at {path}; check the path")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TrainingError(f"{path} can't be read as weights ({reason}); fetch it again") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = content.values() if isinstance(content, Mapping) else ()
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TrainingError(f"{path} holds no state dict (names to tensors)")
    return {str(name): tensor for name, tensor in content.items()}


def split_finetuned(state: StateDict) -> tuple[StateDict, StateDict]:
    """Slide-encoder and head tensors of `state`.

    A fine-tuned checkpoint has the encoder under `slide_encoder.` and the head as `classifier.0`; a published
    one is the bare encoder, and its head is empty.
    """
    head = {name: state[name] for name in HEAD_KEYS if name in state}
    rest = {name: tensor for name, tensor in state.items() if name not in head}
    if rest and all(name.startswith(SLIDE_PREFIX) for name in rest):
        rest = {name.removeprefix(SLIDE_PREFIX): tensor for name, tensor in rest.items()}
    return rest, head


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, which may be on the meta device; dtypes stay the module's.

    Raises a `TrainingError` that lists missing, extra and misshapen keys; the module is then unchanged.
    """
    own = module.state_dict()
    problems = [
        _listed("missing", sorted(own.keys() - state.keys())),
        _listed("not in this model", sorted(state.keys() - own.keys())),
        _listed(
            "of another shape",
            [
                f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
                for name in sorted(own.keys() & state.keys())
                if state[name].shape != own[name].shape
            ],
        ),
    ]
    if any(problems):
        raise TrainingError(
            f"{source} doesn't fit {type(module).__name__}: {'; '.join(filter(None, problems))}"
        )
    module.load_state_dict({name: t.to(own[name].dtype) for name, t in state.items()}, assign=True)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and values of `state`, independent of file and order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    return f"{len(keys)} {what} ({', '.join(keys[:LISTED])}{more})"
