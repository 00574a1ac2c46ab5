"""A slide on a DICOMweb server: its frames are fetched one by one, where they are looked at."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import requests
import tenacity
from dicomweb_client.api import DICOMwebClient
from pydicom import Dataset
from pydicom.uid import RLELossless
from wsidicom import WsiDicom, WsiDicomWebClient, errors
from wsidicom.config import Settings

from gigapath_contract.errors import one_line

from ..arrays import Pixels
from ..errors import SlideError, SlideServerError
from .address import TOKENS, RemotePath
from .damage import check_claims
from .levels import downsamples_of
from .mpp import Properties
from .tiff import DAMAGE, LARGEST_TILE

_OPEN_SERIES = 4  # that are kept open with their frames, each at most ...
_CACHE_BYTES = 64 << 20  # ... so many bytes of them, decoded
_TIMEOUT_S = (10, 60)  # to connect, and between two bytes
_LARGEST_ANSWER = LARGEST_TILE  # bytes, of frames that are asked for at once as of an instance's header
_LONGEST_S = 300  # that an answer may take
_PASSING = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_BUSY = (408, 429, 502, 503, 504)
_MOST_FRAMES = 1 << 24
_THREADS = 8  # that ask for headers
_JPEG_XL = [f"1.2.840.10008.1.2.4.11{kind}" for kind in range(3)]  # that hide a frame's size
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
        try:
            with _server_errors(path):
                self._slide = WsiDicom.open_web(_AsStored(path, service), study, series, settings=settings)
                pyramids = list(self._slide.pyramids)
        except errors.WsiDicomNotFoundError:
            raise SlideError(
                f"{path}: has no whole-slide image: give a series of one (modality SM)"
            ) from None
        except _KINDS as error:
            raise SlideError(
                f"{path}: cannot be read ({one_line(error)}): check the slide on its server, or download it"
            ) from None
        if len(pyramids) != 1:
            raise SlideError(
                f"{path}: holds {len(pyramids)} images of separate parts of a slide: download them"
            )
        self._levels = list(pyramids[0])
        if (paths := max(len(level.optical_paths) for level in self._levels)) > 1:
            raise SlideError(f"{path}: holds {paths} optical paths: store one in a series of its own")
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
            try:
                with _server_errors(self._path):
                    pixels = self._slide.read_region(
                        (x, y), self._levels[level].level, (width, height), threads=1, as_array=True
                    )
            except _KINDS as error:
                raise SlideError(f"cannot decode level {level} at {location} ({one_line(error)})") from None
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


class _Session(requests.Session):
    """Asks again, for 3 seconds in all, where the network or a busy server may be to blame."""

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(_PASSING)
        | tenacity.retry_if_result(lambda answer: answer.status_code in _BUSY),
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_exponential(0.2),
        retry_error_callback=lambda state: state.outcome and state.outcome.result(),
    )
    def get(self, *arguments: Any, **options: Any) -> requests.Response:
        """See `requests`; an answer is read within `_LONGEST_S`."""
        return super().get(*arguments, **options)


class _AsStored(WsiDicomWebClient):  # type: ignore[misc]
    """Asks for each instance's frames as they are stored.

    wsidicom prefers JPEG, and a server that can would encode lossless frames as such, with other pixels.
    """

    def __init__(self, path: RemotePath, service: str) -> None:
        self._path, self._service, self._session = path, service, _Session()
        self._session.max_redirects = 0
        self._session.verify = os.environ.get("SSL_CERT_FILE") or True
        self._session.hooks["response"].append(self._bound)
        login = path.login()
        if isinstance(login, tuple):
            self._session.auth = login
        elif login:
            self._session.headers["Authorization"] = f"Bearer {login}"
        client = DICOMwebClient(service, session=self._session, timeout=_TIMEOUT_S)
        client.set_http_retry_params(retry=False)  # it would ask again after any error; `_Session` does not
        self._stored = functools.cache(self._ask)
        self._headers: dict[str, Dataset] = {}  # that were fetched and not yet asked for
        self._parts: dict[str, list[tuple[int, str]]] = {}  # offset of their first frame, and UID
        super().__init__(client)

    def get_wsi_instances(self, study: Any, series: Any) -> Iterator[tuple[Any, Any, None]]:
        """UIDs of series and instance, of a concatenation (PS3.3 C.7.6.16.2.2.4) those of its first part.

        Not the transfer syntaxes that the server could encode them in.
        """
        found = [(study, *uids[:2]) for uids in super().get_wsi_instances(study, series)]
        with ThreadPoolExecutor(_THREADS) as threads:
            headers = list(threads.map(lambda uids: self._header(*uids), found))
        groups: dict[str, list[Dataset]] = {}
        for header in headers:
            groups.setdefault(header.get("ConcatenationUID") or header.SOPInstanceUID, []).append(header)
        for parts in groups.values():
            parts.sort(key=_offset)
            first = parts[0].SOPInstanceUID
            self._parts[first] = [(_offset(part), part.SOPInstanceUID) for part in parts]
            self._headers[first] = _joined(parts) if "ConcatenationUID" in parts[0] else parts[0]
            yield parts[0].SeriesInstanceUID, first, None

    def get_instance(self, study: Any, series: Any, instance: Any) -> Any:
        """An instance's header; of a concatenation that of all its frames."""
        return self._headers.pop(instance, None) or self._header(study, series, instance)

    def _header(self, *uids: Any) -> Any:
        """A header as it is stored, where it claims no more than a slide can hold."""
        header = super().get_instance(*uids)
        width, height, *tile = (
            int(header.get(name) or 1)
            for name in ("TotalPixelMatrixColumns", "TotalPixelMatrixRows", "Columns", "Rows")
        )
        tiles = dict(zip(_tile_names(0), map(str, tile), strict=True))
        check_claims(self._path, [(width, height)], {"openslide.vendor": "dicom", **tiles})
        if -(-width // tile[0]) * -(-height // tile[1]) > _MOST_FRAMES:
            raise SlideError(f"{self._path}: its header claims frames of {tile[0]}x{tile[1]} px: damaged")
        return header

    def get_frames(
        self, study: Any, series: Any, instance: Any, numbers: Any, syntax: Any
    ) -> Iterator[bytes]:
        """Stored frames, checked to claim no more pixels than a tile can have."""
        parts = self._parts[instance]
        for (offset, part), some in itertools.groupby(numbers, lambda number: _part_of(number, parts)):
            local = [number - offset for number in some]
            missing = len(local)
            for frame in super().get_frames(study, series, part, local, syntax):
                if syntax.is_encapsulated and syntax != RLELossless:  # else decoders go by the header's size
                    width, height = _claimed(frame)
                    if not 0 < 4 * width * height <= LARGEST_TILE:
                        raise ValueError(f"a frame claims {width}x{height} px")
                missing -= 1
                yield frame
            if missing > 0:  # their tiles would count as damaged
                raise SlideServerError(
                    f"{self._path}: the server leaves out {missing} of {len(local)} frames: try again"
                )

    def _bound(self, answer: requests.Response, **_options: Any) -> None:
        """Refuse a page for people, and have an answer end with an error where it is too long."""
        if answer.ok and answer.headers.get("Content-Type", "").startswith("text/"):
            raise SlideServerError(
                f"{self._path}: the server sends a page of text, as for a login, in place of DICOM: check "
                f"the address and what {TOKENS} holds"
            )
        read: Any = answer.iter_content

        def bounded(chunk_size: int | None = 1, decode_unicode: bool = False) -> Iterator[Any]:
            left, end = _LARGEST_ANSWER, time.monotonic() + _LONGEST_S
            for part in read(chunk_size, decode_unicode):
                if time.monotonic() > end:
                    raise self._path.unreachable(f"not all of an answer in {_LONGEST_S} seconds")
                if (left := left - len(part)) < 0:
                    raise SlideServerError(
                        f"{self._path}: the server sends more than {_LARGEST_ANSWER >> 20} MiB at once: "
                        "download the slide"
                    )
                yield part

        answer.iter_content = bounded  # type: ignore[method-assign]

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
        if found[1] in _JPEG_XL:
            raise SlideError(f"{self._path}: its frames are in JPEG XL: download and convert it")
        return found[1]


def _offset(header: Dataset) -> int:
    return int(header.get("ConcatenationFrameOffsetNumber") or 0)


def _part_of(number: int, parts: list[tuple[int, str]]) -> tuple[int, str]:
    """The part of a concatenation that holds a frame, which are counted from 1."""
    return next(part for part in reversed(parts) if part[0] < number)


def _joined(parts: list[Dataset]) -> Dataset:
    """The header of the parts of a concatenation as one instance: wsidicom would take the first part alone.

    Raises:
        ValueError: some part is missing.
    """
    joined, counts = parts[0], [int(part.NumberOfFrames) for part in parts]
    if [_offset(part) for part in parts] != [sum(counts[:number]) for number in range(len(parts))]:
        raise ValueError("parts of a concatenation are missing")
    joined.NumberOfFrames = sum(counts)
    if "PerFrameFunctionalGroupsSequence" in joined:
        joined.PerFrameFunctionalGroupsSequence = [
            frame for part in parts for frame in part.PerFrameFunctionalGroupsSequence
        ]
    for name in [name for name in joined.dir("Concatenation") if name in joined]:
        delattr(joined, name)
    return joined


@contextmanager
def _server_errors(path: RemotePath) -> Iterator[None]:
    """What is wrong with the server or the network, as one line."""
    try:
        yield
    except requests.HTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        if code in (401, 403):
            raise path.refusal(str(code)) from None
        raise SlideServerError(
            f"{path}: the server answers {code}: check the address and the server's log"
        ) from None
    except requests.TooManyRedirects:
        raise SlideServerError(f"{path}: the server leads elsewhere: give that address") from None
    except requests.exceptions.InvalidJSONError:
        raise SlideServerError(f"{path}: the server does not speak DICOMweb: check the address") from None
    except requests.RequestException as error:
        raise path.unreachable(type(error).__name__) from None


def _properties(levels: list[Any]) -> Properties:
    spacing = levels[0].pixel_spacing
    properties = {
        "openslide.vendor": "dicom",
        "openslide.mpp-x": repr(float(spacing.width) * 1000),
        "openslide.mpp-y": repr(float(spacing.height) * 1000),
    }
    for number, level in enumerate(levels):
        size = level.tile_size
        properties |= zip(_tile_names(number), (str(size.width), str(size.height)), strict=True)
    return properties


def _tile_names(level: int) -> tuple[str, str]:
    return f"openslide.level[{level}].tile-width", f"openslide.level[{level}].tile-height"


def _claimed(frame: bytes) -> tuple[int, int]:
    """(width, height) in the header of a JPEG, JPEG-LS or JPEG 2000 stream.

    Raises:
        ValueError, struct.error, IndexError: it has none.
    """
    if frame[4:8] == b"jP  ":  # the boxes of a JP2 file, which some servers put round the stream
        place = 0
        while frame[place + 4 : place + 8] != b"jp2c":
            if (length := int.from_bytes(frame[place : place + 4])) < 8:
                raise ValueError("a frame without a size")
            place += length
        frame = frame[place + 8 :]
    if frame[:4] == b"\xff\x4f\xff\x51":
        width, height = struct.unpack_from(">II", frame, 8)
        return width, height
    place = 2
    while frame[:2] == b"\xff\xd8" and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF:  # may fill
            place += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack_from(">HH", frame, place + 5)
            return width, height
        place += 2 + int.from_bytes(frame[place + 2 : place + 4])
    raise ValueError("a frame without a size")
