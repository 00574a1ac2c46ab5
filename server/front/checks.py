"""What a request to a served model must keep to, by the model's configuration and its contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.backends.onnxruntime.request_limits import Limits, check_lengths, check_limits, read_limits
from server.front.wire import VARINT, Request, fields, numbers

DATATYPES = {
    1: ("BOOL", np.dtype(np.bool_)),
    2: ("UINT8", np.dtype(np.uint8)),
    3: ("UINT16", np.dtype(np.uint16)),
    4: ("UINT32", np.dtype(np.uint32)),
    5: ("UINT64", np.dtype(np.uint64)),
    6: ("INT8", np.dtype(np.int8)),
    7: ("INT16", np.dtype(np.int16)),
    8: ("INT32", np.dtype(np.int32)),
    9: ("INT64", np.dtype(np.int64)),
    10: ("FP16", np.dtype(np.float16)),
    11: ("FP32", np.dtype(np.float32)),
    12: ("FP64", np.dtype(np.float64)),
}
"""By their number in model_config.proto; those whose elements have one size."""
SLIDE: Mapping[str, Sequence[int | str]] = {
    "EMBEDDINGS": ("N", "D"),
    "COORDS": ("N", 2),
    "KEEP": ("M", "N"),
}


@dataclass(frozen=True)
class Spec:
    """Datatype and dimensions of an input, the batch's included; -1 stands for any length."""

    datatype: str
    dtype: np.dtype
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A served model's inputs, and the limits of its contract where it has one."""

    inputs: Mapping[str, Spec]
    limits: Limits | None


def read_model(answer: bytes) -> Model:
    """The model of a ModelConfigResponse.

    Raises:
        ValueError, KeyError: an input's datatype or the contract can't be read.
    """
    (config,) = (data for number, _, _, data in fields(memoryview(answer)) if number == 1)
    batching, inputs, parameters = False, [], {}
    for number, kind, value, data in fields(config):
        if (number, kind) == (4, VARINT):
            batching = value > 0
        elif number == 5:
            inputs.append({n: (v, content) for n, _, v, content in fields(data)})
        elif number == 14:
            entry = {n: content for n, _, _, content in fields(data)}
            text = {n: content for n, _, _, content in fields(entry[2])}.get(1, b"")
            parameters[bytes(entry[1]).decode()] = {"string_value": bytes(text).decode()}
    specs = {}
    for one in inputs:
        datatype, dtype = DATATYPES[one[2][0]]
        dims = (value - (value >> 63 << 64) for value in numbers(one[4][1]))
        specs[bytes(one[1][1]).decode()] = Spec(datatype, dtype, (*[-1] * batching, *dims))
    return Model(specs, read_limits({"parameters": parameters}))


def check_request(request: Request, model: Model) -> None:
    """Raise ValueError, with one line, unless `model` can be given this request."""
    if len(request.raw) != len(request.inputs):
        raise ValueError(f"{len(request.inputs)} inputs but data of {len(request.raw)}")
    arrays = {}
    for tensor, raw in zip(request.inputs, request.raw, strict=True):
        name, shape = tensor.name, tensor.shape
        spec = model.inputs.get(name)
        if spec is None or name in arrays:
            raise ValueError(f"{'unknown' if spec is None else 'a second'} input {name}")
        if tensor.datatype != spec.datatype:
            raise ValueError(f"{name} is {tensor.datatype}, not {spec.datatype}")
        fits = len(shape) == len(spec.dims) and all(
            length > 0 and dim in (-1, length) for length, dim in zip(shape, spec.dims, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if dim < 0 else str(dim) for dim in spec.dims)
            raise ValueError(f"the shape of {name} is {list(shape)}, not [{wanted}]")
        size = math.prod(shape) * spec.dtype.itemsize  # an int of Python: it doesn't wrap
        if size != len(raw):
            raise ValueError(f"{name} {list(shape)} has {size} bytes, {len(raw)} came")
        arrays[name] = np.frombuffer(raw, spec.dtype).reshape(shape)
    if model.limits is not None:
        check_lengths({name: arrays[name] for name in SLIDE if name in arrays}, SLIDE)
        check_limits(arrays, model.limits)
