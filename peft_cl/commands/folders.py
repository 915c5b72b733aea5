"""A local folder of images: which of its folders are splits, which are classes, and which were left out."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..scenarios.columns import LAYOUT
from ..scenarios.overlap import StoredImages
from ..text import counted
from .errors import CommandError, some


#: Name of a folder -> the split that `datasets` takes it for.
SPLIT_OF = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
#: Endings of files that lie beside images without being meant as some.
NO_SLIP = (
    "",
    ".txt",
    ".md",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".xml",
    ".yaml",
    ".yml",
    ".html",
    ".py",
    ".db",
    ".ini",
)
METADATA = tuple(ImageFolder.METADATA_FILENAMES)


def visible_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(place within the folder, sorted names of files) of each folder below it, without hidden files and folders."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield os.path.relpath(place, folder), sorted(name for name in files if not name.startswith((".", "__")))


def kind_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def image_files(folder: Path) -> list[str]:
    """The images in a folder as paths within it."""
    found = []
    for place, files in visible_files(folder):
        if any(name in METADATA for name in files):
            return []  # what belongs together, and where, the file of metadata says
        found += [
            os.path.normpath(os.path.join(place, name)) for name in files if kind_of(name) in ImageFolder.EXTENSIONS
        ]
    return found


def other_files(folder: Path) -> list[str]:
    """Files in folders of classes that `datasets` takes for no images; texts, tables and pages are no slip."""
    no_slip = {*ImageFolder.EXTENSIONS, *NO_SLIP}
    return [
        os.path.join(place, name)
        for place, files in visible_files(folder)
        for name in files
        if place != os.curdir and kind_of(name) not in no_slip
    ]


def lost_zeros(folder: Path, label_column: str) -> str | None:
    """A label of a metadata.csv that would be read as another: `0062` becomes the number 62. `None`: there is none."""
    for file in sorted(folder.rglob("metadata.csv")):
        with open(file, encoding="utf-8", errors="replace", newline="") as text:
            for row in csv.DictReader(text):
                if re.fullmatch(r"0\d+", (row.get(label_column) or "").strip()):
                    return f"{row[label_column]!r} in {str(file)!r}"
    return None


def split_patterns(folder: Path, label_column: str) -> dict[str, list[str]] | None:
    """Which files each split of a folder of images has, as `data_files` of `load_dataset`; `None`: as that says.

    `datasets` takes a folder named 'train' or 'test' for a split at any depth, and a file too, which splits data with
    such a class. Here such folders are splits at the top alone, and classes elsewhere.

    Raises:
        CommandError: The images have no folders that name their classes.
    """
    others = {path.suffix for path in folder.iterdir() if path.is_file() and path.name != "README.md"}
    has_configuration = (folder / "README.md").is_file() and "configs:" in (folder / "README.md").read_text(
        encoding="utf-8", errors="replace"
    )
    names = image_files(folder)
    odd = next((name for name in names if os.path.expandvars(name) != name), None)
    if odd is not None:
        raise CommandError(
            f"{odd!r} in {str(folder)!r} has a '$' with the name of a variable of the shell, whose value would take "
            "its place. Rename it."
        )
    files = [Path(name).parts for name in names]
    if not files or has_configuration or others - set(ImageFolder.EXTENSIONS) - {"", ".txt", ".md", ".py", ".html"}:
        return None
    top = sorted({parts[0] for parts in files if len(parts) > 1})
    divided = [name for name in top if any(parts[0] == name and len(parts) > 2 for parts in files)]
    splits = [name for name in top if name in SPLIT_OF]
    if not divided and top == splits:
        if label_column != "label":
            return None
        where = f" in {some(splits)}" if splits else ""
        raise CommandError(
            f"The images of {str(folder)!r} lie{where} without folders for their classes, so nothing says what they "
            f"show. {LAYOUT}; or say it in a file metadata.csv beside them, with a column file_name and one of "
            "labels, and set dataset.label_column."
        )
    if not divided:  # classes, whatever their names and those of their files
        return {"train": [f"{_literal(name)}/**" for name in top]}
    patterns: dict[str, list[str]] = {}
    for name in splits:
        if name in divided:
            patterns.setdefault(SPLIT_OF[name], []).append(f"{_literal(name)}/*/**")
    return patterns or None


def _literal(name: str) -> str:
    """The name as a pattern that it alone fits."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def warn_of_left_out(folder: Path, splits: Mapping[str, Dataset]) -> None:
    """Say which images of a folder are in none of the splits.

    Warns:
        UserWarning: There are some, with their folders.
    """
    taken: set[str] = set()
    for data in splits.values():
        for column, feature in data.features.items():
            stored = StoredImages.of(data, column) if type(feature).__name__ == "Image" else None
            if stored is not None:
                taken.update(os.path.realpath(stored.file(row) or "") for row in range(len(data)))
    names = image_files(folder)
    dangling = [name for name in names if not os.path.exists(folder / name)]
    if dangling:
        warnings.warn(
            f"Links to nothing are left out, {counted(len(dangling), 'file')} of {str(folder)!r}: {some(dangling)}. "
            "Restore what they link to.",
            stacklevel=2,
        )
    others = other_files(folder) if names else []
    if others:
        warnings.warn(
            f"Files that are not read as images are left out, {counted(len(others), 'file')} of {str(folder)!r}: "
            f"{some(others)}. Convert them to JPEG or PNG.",
            stacklevel=2,
        )
    left = [name for name in names if name not in dangling and os.path.realpath(folder / name) not in taken]
    if left and taken != {os.path.realpath("")}:
        places = Counter(str(Path(name).parent) for name in left)
        listed = some([f"{place} ({count:,})" for place, count in places.items()])
        warnings.warn(
            f"What is in none of the splits {list(splits)} is left out, {counted(len(left), 'image')} of "
            f"{str(folder)!r}: {listed}.",
            stacklevel=2,
        )


def without_labels(settings: Any, splits: Mapping[str, Dataset]) -> str | None:
    """What is wrong where `datasets` found no labels in the folders of images; `None`: something else."""
    data = next(iter(splits.values()))
    if settings.label_column != "label" or "label" in data.features or set(data.features) != {"image"}:
        return None
    return (
        f"The images of {settings.path!r} have no labels: their folders lie at several depths, or there is one alone. "
        f"{LAYOUT}."
    )
