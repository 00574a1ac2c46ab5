"""Inputs through system shared memory instead of through the wire, for a server on the same host."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import tenacity
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from ..arrays import Array

_TIMEOUT_S = 5


def is_lost_region(error: InferenceServerException) -> bool:
    """Whether the server doesn't know a region (any more), as after its restart."""
    return "unable to find shared memory region" in (error.message() or "").lower()


@tenacity.retry(
    retry=tenacity.retry_if_exception(
        lambda error: isinstance(error, InferenceServerException) and "in use" in (error.message() or "")
    ),
    wait=tenacity.wait_fixed(0.01),
    stop=tenacity.stop_after_delay(5),
    reraise=True,
)
def unregister(client: InferenceServerClient, name: str, headers: Mapping[str, str]) -> None:
    """Make the server let go of a region, which it does a moment after the answer that needed it.

    Raises:
        InferenceServerException: the server is gone, or still uses the region after 5 s.
    """
    client.unregister_system_shared_memory(name, headers=headers, client_timeout=_TIMEOUT_S)


class SharedInputs:
    """One region for each thread that sends, grown as needed and registered with the server by its name.

    Python's resource tracker unlinks the regions of a client that was killed.
    """

    def __init__(self) -> None:
        self._mine = threading.local()
        self._all: dict[str, SharedMemory] = {}

    def place(
        self, client: InferenceServerClient, inputs: Mapping[str, Array], headers: Mapping[str, str]
    ) -> list[InferInput]:
        """Copy arrays into this thread's region; returns the tensors that point there."""
        region = self._region(client, sum(array.nbytes for array in inputs.values()), headers)
        tensors, offset = [], 0
        for name, array in inputs.items():
            view: Array = np.ndarray(array.shape, array.dtype, region.buf, offset)
            view[...] = array
            del view  # the region can't be closed while an array looks into it
            tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_shared_memory(region.name, array.nbytes, offset))
            offset += array.nbytes
        return tensors

    def forget(self, client: InferenceServerClient, headers: Mapping[str, str]) -> None:
        """Give up this thread's region: the next `place` makes a new one."""
        region: SharedMemory | None = getattr(self._mine, "region", None)
        if region is not None:
            self._mine.region = None
            self._release(region, client, headers)

    def close(self, client: InferenceServerClient, headers: Mapping[str, str]) -> None:
        """Give up the regions of all threads, none of which may send any more."""
        for region in list(self._all.values()):
            self._release(region, client, headers)

    def _region(self, client: InferenceServerClient, size: int, headers: Mapping[str, str]) -> SharedMemory:
        region: SharedMemory | None = getattr(self._mine, "region", None)
        if region is None or region.size < size:
            self.forget(client, headers)
            region = SharedMemory(create=True, size=size)
            self._mine.region = self._all[region.name] = region
            client.register_system_shared_memory(
                region.name, f"/{region.name}", size, headers=headers, client_timeout=_TIMEOUT_S
            )
        return region

    def _release(
        self, region: SharedMemory, client: InferenceServerClient, headers: Mapping[str, str]
    ) -> None:
        self._all.pop(region.name, None)
        with contextlib.suppress(InferenceServerException):
            unregister(client, region.name, headers)
        region.close()
        region.unlink()
