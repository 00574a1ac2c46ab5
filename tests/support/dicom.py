"""Write a slide as DICOM instances that OpenSlide reads: one file per level, tiled in full."""

from __future__ import annotations

import copy
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    SegmentationStorage,
    VLWholeSlideMicroscopyImageStorage,
    generate_uid,
)

from tests.support.pyramid import shrink, take

TILE = 256


def write_series(
    folder: Path,
    stem: str,
    pixels: NDArray[np.uint8],
    *,
    mpp: float = 0.5,
    levels: tuple[int, ...] = (1, 4),
    flavour: str = "VOLUME",
    suffix: str = ".dcm",
    lossless: bool = False,
) -> list[Path]:
    """A series of RGB `pixels` uint8 [h, w, 3]: `folder/<stem>-<level><suffix>`; `lossless`: in JPEG 2000."""
    series, paths = generate_uid(entropy_srcs=[stem]), []
    for number, factor in enumerate(levels):
        picture = shrink(pixels, factor)
        height, width = picture.shape[:2]
        data = _instance(VLWholeSlideMicroscopyImageStorage, series, f"{stem} {factor}")
        data.ImageType = ["ORIGINAL" if factor == 1 else "DERIVED", "PRIMARY", flavour, "NONE"]
        data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
        data.ImagedVolumeWidth, data.ImagedVolumeHeight = (
            width * mpp * factor / 1000,
            height * mpp * factor / 1000,
        )
        data.Rows = data.Columns = TILE
        if lossless:
            data.file_meta.TransferSyntaxUID = JPEG2000Lossless
        data.PhotometricInterpretation = "YBR_RCT" if lossless else "YBR_FULL_422"
        data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.PixelRepresentation = 7, 0
        data.DimensionOrganizationType = "TILED_FULL"
        data.TotalPixelMatrixFocalPlanes = 1
        data.NumberOfOpticalPaths = 1
        data.InstanceNumber = number + 1
        measures, shared = Dataset(), Dataset()
        measures.PixelSpacing = [mpp * factor / 1000] * 2
        shared.PixelMeasuresSequence = [measures]
        data.SharedFunctionalGroupsSequence = [shared]
        padded = np.pad(picture, ((0, -height % TILE), (0, -width % TILE), (0, 0)))
        frames = [
            _encode(take(padded, x, y, TILE), lossless)
            for y in range(0, height, TILE)
            for x in range(0, width, TILE)
        ]
        data.NumberOfFrames = len(frames)
        data.PixelData = encapsulate(frames)
        paths.append(folder / f"{stem}-{factor}{suffix}")
        data.save_as(paths[-1], enforce_file_format=True)
    return paths


def split_instance(path: Path, count: int, *, sparse: bool) -> list[Path]:
    """An instance as the parts of a concatenation; `sparse`: each lists where its frames lie, in disorder."""
    whole, paths = pydicom.dcmread(path), []
    frames = list(generate_frames(whole.PixelData, number_of_frames=int(whole.NumberOfFrames)))
    columns, order = -(-whole.TotalPixelMatrixColumns // TILE), np.arange(len(frames))
    if sparse:
        np.random.default_rng(0).shuffle(order)
        whole.DimensionOrganizationType = "TILED_SPARSE"
    whole.ConcatenationUID = generate_uid(entropy_srcs=[whole.SOPInstanceUID])
    whole.SOPInstanceUIDOfConcatenationSource = whole.SOPInstanceUID
    for number, indices in enumerate(np.array_split(np.arange(len(frames)), count)):
        part = copy.deepcopy(whole)
        part.SOPInstanceUID = generate_uid(entropy_srcs=[whole.ConcatenationUID, str(number)])
        part.InConcatenationNumber, part.ConcatenationFrameOffsetNumber = number + 1, int(indices[0])
        if sparse:
            part.PerFrameFunctionalGroupsSequence = [_place(*divmod(int(order[i]), columns)) for i in indices]
        part.NumberOfFrames = len(indices)
        part.PixelData = encapsulate([frames[order[i]] for i in indices])
        paths.append(path.with_name(f"{path.stem}-part-{number}{path.suffix}"))
        part.save_as(paths[-1], enforce_file_format=True)
    path.unlink()
    return paths


def _place(row: int, column: int) -> Dataset:
    place, frame = Dataset(), Dataset()
    place.ColumnPositionInTotalImagePixelMatrix = column * TILE + 1
    place.RowPositionInTotalImagePixelMatrix = row * TILE + 1
    place.XOffsetInSlideCoordinateSystem = place.YOffsetInSlideCoordinateSystem = 0.0
    place.ZOffsetInSlideCoordinateSystem = 0.0
    frame.PlanePositionSlideSequence = [place]
    return frame


def _encode(tile: NDArray[np.uint8], lossless: bool) -> bytes:
    if lossless:
        return bytes(imagecodecs.jpeg2k_encode(tile, reversible=True, mct=True, codecformat="j2k"))
    return bytes(imagecodecs.jpeg8_encode(tile, level=90, colorspace="RGB", outcolorspace="YCBCR"))


def write_segmentation(path: Path, series: str) -> None:
    """What a viewer stores beside a slide: an instance of another kind, without pixels."""
    _instance(SegmentationStorage, generate_uid(entropy_srcs=[series]), path.name).save_as(
        path, enforce_file_format=True
    )


def _instance(kind: str, series: str, name: str) -> Dataset:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.SOPClassUID, data.SOPInstanceUID = kind, generate_uid(entropy_srcs=[series, name])
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(entropy_srcs=["study"]), series
    data.FrameOfReferenceUID = generate_uid(entropy_srcs=[series, "frame"])
    data.Modality = "SM"
    return data
