"""Folders of images, in one sub-folder for each class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.data.formats.record import Format
from fedpeft.data.formats.text_files import table
from fedpeft.errors import DataError
from fedpeft.places import TEST_PARTS, Place, Wanted, counts, files_in

if TYPE_CHECKING:
    import datasets

IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga"}
    | {".tif", ".tiff", ".webp"}
)
# pictures all the same: whoever has one among the rows does not mean it to be left out
FOREIGN_IMAGE_SUFFIXES = frozenset(
    {".arw", ".cr2", ".cr3", ".dcm", ".dng", ".heic", ".heif", ".jxl", ".nef", ".psd", ".raw", ".svg"}
)
LOOKED_AT = 10_000  # files of a sub-folder, before it is taken for one without images: it may be the whole disk
SHOWN = 3  # files that a message names


def _splits(name: str, folder: Path) -> dict[str, Place]:
    return {part or "": Place(name, IMAGE_FOLDER.name, path, part) for part, path in image_folders(folder).items()}


def _read(place: Place, wanted: Wanted) -> datasets.Dataset:
    base = place.path
    assert base is not None
    names = wanted.present(place, ["image", "label"])
    loose = [path for path in sorted(base.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    loose = [path for path in loose if path.name[0] != "." and path.is_file()]
    foreign = foreign_images(base)
    if loose and not wanted.tolerant:
        raise DataError(f"'{loose[0]}' lies outside every class folder of {place}. Move it into one, or remove it.")
    if foreign and not wanted.tolerant:
        raise DataError(
            f"{place} holds {len(foreign)} images of kinds that are not read ({listed(foreign, base)}). "
            "Convert them to PNG or JPEG, or remove them."
        )
    images = [path for folder in class_folders(base) for path in images_in(folder)]
    if unnamed := [path for path in images if not _is_text(str(path))]:
        raise DataError(
            f"{place} holds {len(unnamed)} images whose names are no text in UTF-8 "
            f"({ascii(listed(unnamed, base))[1:-1]}). Rename them or their folders."
        )
    # as in any other source, paths are relative to the folder that the rows lie in
    rows = [(str(path.relative_to(base)), folder.name) for folder in class_folders(base) for path in images_in(folder)]
    rows += [(str(path), "") for path in (*loose, *foreign)]  # where they are tolerated, as rows without a label
    return table(place, rows, ["image", "label"]).select_columns(names)


def _is_text(name: str) -> bool:
    """Say whether a name from the file system has no bytes that stand for no character."""
    return not any("\ud800" <= letter < "\ue000" for letter in name)


def _cautions(place: Place) -> tuple[str, ...]:
    """Say in one line each what in a folder of images is no row."""
    base = place.path
    assert base is not None
    files, folders = not_images(base)
    notes = []
    if files:
        notes.append(f"files in {place} that are no images and no rows: {len(files)} ({listed(files, base)})")
    if folders:
        notes.append(
            f"folders in {place} without images, which are no classes: {len(folders)} ({listed(folders, base)})"
        )
    if place.part == "train" and (others := beside(base.parent)):
        notes.append(
            f"folders of images in '{place.name}' that belong to no split and are no rows: {len(others)} "
            f"({listed(others, base.parent)})"
        )
    return tuple(notes)


def listed(paths: Sequence[Path], base: Path) -> str:
    """Name the first few files by their paths in a folder."""
    names = [str(path.relative_to(base)) if path.is_relative_to(base) else str(path) for path in paths[:SHOWN]]
    return ", ".join(names) + (", ..." if len(paths) > SHOWN else "")


def image_folders(folder: Path) -> dict[str | None, Path]:
    """Return where classes of images lie: below ``train`` and its company, or below the folder itself (None)."""
    # train/ without class folders below it is itself a class
    folders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    divided: dict[str | None, Path] = {
        part: folders[part] for part in ("train", *TEST_PARTS) if part in folders and class_folders(folders[part])
    }
    if "train" in divided:
        return divided
    return {None: folder} if class_folders(folder) else {}


def class_folders(folder: Path) -> list[Path]:
    """Return the sub-folders that hold images, by name."""
    return sorted(path for path in folder.iterdir() if counts(path) and path.is_dir() and _holds_images(path))


def images_in(folder: Path) -> list[Path]:
    """Return the images anywhere below a folder, by path."""
    return sorted(path for path in _files_of_class(folder) if path.suffix.lower() in IMAGE_SUFFIXES)


def not_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return what below a folder of images becomes no row: files that are no images, and folders without any."""
    files = sorted(path for path in files_in(folder) if not _is_image(path))
    return files, sorted(
        path for path in folder.iterdir() if counts(path) and path.is_dir() and not _holds_images(path)
    )


def beside(folder: Path) -> list[Path]:
    """Return the folders of images that lie beside the splits of a divided folder and belong to none."""
    splits = set(image_folders(folder).values())
    return sorted(
        path
        for path in folder.iterdir()
        if counts(path) and path.is_dir() and path not in splits and _holds_images(path)
    )


def foreign_images(folder: Path) -> list[Path]:
    """Return the images below a folder of kinds that are not read."""
    return sorted(path for path in files_in(folder) if path.suffix.lower() in FOREIGN_IMAGE_SUFFIXES)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES | FOREIGN_IMAGE_SUFFIXES


def _holds_images(folder: Path) -> bool:
    return any(_is_image(path) for path in itertools.islice(_files_of_class(folder), LOOKED_AT))


def _files_of_class(folder: Path) -> Iterator[Path]:
    """Yield the files below a class folder; a link back to where all classes lie makes none of them this class."""
    return files_in(folder, frozenset({folder.parent.resolve()}))


IMAGE_FOLDER = Format(
    "image-folder",
    "a folder of images in one sub-folder per class",
    _read,
    splits=_splits,
    implies={"image": "image"},
    may_link=lambda place, column: False,
    cautions=_cautions,
)
