"""A slide on a DICOMweb server: its frames are fetched one by one, where they are looked at."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import requests
from dicomweb_client.api import DICOMwebClient
from wsidicom import WsiDicom, WsiDicomWebClient, errors
from wsidicom.config import Settings

from ..arrays import Pixels
from ..errors import SlideError, SlideServerError
from .address import RemotePath
from .damage import check_claims, one_line
from .levels import downsamples_of
from .mpp import Properties
from .tiff import DAMAGE

_OPEN_SERIES = 4  # that are kept open with their frames, each at most ...
_CACHE_BYTES = 64 << 20  # ... so many bytes of them, decoded
_TIMEOUT_S = (10, 60)  # to connect, and between two bytes
_ANY_SYNTAX = 'multipart/related; type="application/octet-stream"; transfer-syntax=*'
_KINDS: tuple[type[Exception], ...] = (
    *(kind for name, kind in vars(errors).items() if name.startswith("WsiDicom")),
    *DAMAGE,
)
_SYNTAX = re.compile(r"transfer-syntax=\"?([0-9.]+)")


class DicomSeries:
    """A DICOMweb series as a `SlideHandle`, through wsidicom; all threads share one, so `close` does nothing.

    Attributes:
        sha256: the digest of its levels' SOP instance UIDs, which DICOM never gives to another content; the
            same on any server.

    Raises:
        SlideServerError: the server does not give it.
        SlideError: no whole-slide image, or one that can't be read.
    """

    library = "wsidicom"

    def __init__(self, path: RemotePath) -> None:
        assert path.series
        service, study, series = path.series
        self._path = path
        settings = Settings(decoded_frame_cache_size=_CACHE_BYTES, encoded_frame_cache_size=0)
        with _errors(path):
            self._slide = WsiDicom.open_web(_AsStored(path, service), study, series, settings=settings)
            pyramids = list(self._slide.pyramids)
        if len(pyramids) != 1:
            raise SlideError(
                f"{path}: holds {len(pyramids)} images of separate parts of a slide: download them"
            )
        self._levels = list(pyramids[0])
        datasets = [dataset for level in self._levels for dataset in level.datasets]
        if any((dataset.samples_per_pixel, dataset.bits) != (3, 8) for dataset in datasets):
            raise SlideError(f"{path}: not in RGB of 8 bits: convert it, for example to tiled JPEG TIFF")
        instances = sorted(str(dataset.uids.instance) for dataset in datasets)
        self.sha256 = hashlib.sha256(repr(instances).encode()).hexdigest()
        self.level_dimensions = tuple((level.size.width, level.size.height) for level in self._levels)
        self.dimensions = self.level_dimensions[0]
        self.level_downsamples = downsamples_of(self.level_dimensions)
        self.properties = _properties(self._levels)
        check_claims(path, self.level_dimensions, self.properties)

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Pixels:
        """RGB uint8 [h, w, 3], white beyond the edge; a place between two pixels of the level is rounded."""
        corner = [round(place / self.level_downsamples[level]) for place in location]
        low = [max(0, place) for place in corner]
        high = [
            min(place + side, whole)
            for place, side, whole in zip(corner, size, self.level_dimensions[level], strict=True)
        ]
        out = np.full((*size[::-1], 3), 255, np.uint8)
        if high[0] > low[0] and high[1] > low[1]:
            (x, y), (width, height) = low, (high[0] - low[0], high[1] - low[1])
            with _errors(self._path):
                pixels = self._slide.read_region(
                    (x, y), self._levels[level].level, (width, height), threads=1, as_array=True
                )
            out[y - corner[1] : y - corner[1] + height, x - corner[0] : x - corner[0] + width] = pixels
        return out

    def close(self) -> None:
        """Nothing: other threads may be reading."""


@functools.lru_cache(_OPEN_SERIES)
def _opened(path: RemotePath, login: tuple[str, str] | str | None) -> DicomSeries:
    return DicomSeries(path)


def open_series(path: RemotePath) -> DicomSeries:
    """A series; the last few stay open.

    Raises:
        SlideServerError, SlideError: see `DicomSeries`.
    """
    return _opened(path, path.login())


def forget_series() -> None:
    """Let go of the series that are open, and of what is known of them."""
    _opened.cache_clear()


class _AsStored(WsiDicomWebClient):  # type: ignore[misc]
    """Asks for each instance's frames as they are stored.

    wsidicom prefers JPEG, and a server that can would encode lossless frames as such, with other pixels.
    """

    def __init__(self, path: RemotePath, service: str) -> None:
        self._path, self._service, self._session = path, service, requests.Session()
        self._session.max_redirects = 0
        self._session.verify = os.environ.get("SSL_CERT_FILE") or True
        login = path.login()
        if isinstance(login, tuple):
            self._session.auth = login
        elif login:
            self._session.headers["Authorization"] = f"Bearer {login}"
        client = DICOMwebClient(service, session=self._session, timeout=_TIMEOUT_S)
        client.set_http_retry_params(max_attempts=5, wait_exponential_multiplier=100)  # 3 seconds in all
        self._stored = functools.cache(self._ask)
        super().__init__(client)

    def get_wsi_instances(self, *uids: Any) -> Iterator[tuple[Any, Any, None]]:
        """UIDs of series and instance; not the transfer syntaxes that the server could encode them in."""
        return ((series, instance, None) for series, instance, _ in super().get_wsi_instances(*uids))

    def is_transfer_syntax_supported(self, study: Any, series: Any, instance: Any, syntax: Any) -> bool:
        """Whether the frames of an instance are stored in this transfer syntax."""
        return self._stored(f"studies/{study}/series/{series}/instances/{instance}") == str(syntax)

    def _ask(self, instance: str) -> str:
        """The transfer syntax that the frames of an instance are stored in."""
        url, headers = f"{self._service}/{instance}/frames/1", {"Accept": _ANY_SYNTAX}
        with self._session.get(url, headers=headers, timeout=_TIMEOUT_S, stream=True) as answer:
            answer.raise_for_status()
            found = _SYNTAX.search(answer.headers.get("Content-Type", ""))
            found = found or _SYNTAX.search(next(answer.iter_content(2048), b"").decode(errors="replace"))
        if not found:
            raise SlideServerError(
                f"{self._path}: the server does not say how its frames are stored: download it"
            )
        return found[1]


@contextmanager
def _errors(path: RemotePath) -> Iterator[None]:
    """What the libraries raise, as one line: of the server and the network, or of what they can't read."""
    try:
        yield
    except requests.HTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403):
            raise path.refusal(code) from None
        raise SlideServerError(
            f"{path}: the server answers {code}: check the address and the server's log"
        ) from None
    except requests.TooManyRedirects:
        raise SlideServerError(f"{path}: the server leads elsewhere: give that address") from None
    except requests.exceptions.InvalidJSONError:
        raise SlideServerError(f"{path}: the server does not speak DICOMweb: check the address") from None
    except requests.RequestException as error:
        raise path.unreachable(type(error).__name__) from None
    except errors.WsiDicomNotFoundError:
        raise SlideError(f"{path}: has no whole-slide image: give a series of one (modality SM)") from None
    except _KINDS as error:
        raise SlideError(
            f"{path}: cannot be read ({one_line(error)}): check the slide on its server"
        ) from None


def _properties(levels: list[Any]) -> Properties:
    spacing = levels[0].pixel_spacing
    properties = {
        "openslide.vendor": "dicom",
        "openslide.mpp-x": repr(float(spacing.width) * 1000),
        "openslide.mpp-y": repr(float(spacing.height) * 1000),
    }
    for number, level in enumerate(levels):
        properties[f"openslide.level[{number}].tile-width"] = str(level.tile_size.width)
        properties[f"openslide.level[{number}].tile-height"] = str(level.tile_size.height)
    return properties
