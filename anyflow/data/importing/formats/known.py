"""The formats that can be imported, and which of them a folder is in."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import cast

from anyflow.data.controls import Control
from anyflow.data.importing.recording import Source
from anyflow.data.importing.survey import ARCHIVES
from anyflow.data.importing.walk import walk
from anyflow.errors import UserError

FORMATS = {
    "lerobot": "anyflow.data.importing.formats.lerobot",
    "nuscenes": "anyflow.data.importing.formats.nuscenes",
    "comma2k19": "anyflow.data.importing.formats.comma2k19",
    "vpt": "anyflow.data.importing.formats.vpt",
    "gf-minecraft": "anyflow.data.importing.formats.gf_minecraft",
    "bdd100k": "anyflow.data.importing.formats.bdd100k",
    "irasim": "anyflow.data.importing.formats.irasim",
    "cosmos": "anyflow.data.importing.formats.cosmos",
    "huggingface": "anyflow.data.importing.formats.huggingface",
    "webdataset": "anyflow.data.importing.formats.webdataset",
    "folder": "anyflow.data.importing.formats.folder",
}
"""Name -> module; the first whose ``detect`` agrees is taken, so the general ones come last."""


def source_of(name: str) -> Source:
    """The importer of a format.

    Raises:
        UserError: there is none of that name.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name!r} is unknown: choose one of {', '.join(FORMATS)}")
    return cast(Source, importlib.import_module(FORMATS[name]))


def controls_of(source: Source, folder: Path) -> dict[str, Control | str]:
    """What a data set's controls hold, for the card: the format's words, made precise where it can read more."""
    return {**source.CONTROLS, **getattr(source, "described_controls", lambda folder: {})(folder)}


def snapshot(folder: Path) -> Path:
    """The files of a data set in the Hugging Face cache (``snapshots/REVISION``); any other folder is itself.

    Raises:
        UserError: there are several revisions and none is named as the main one.
    """
    revisions = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    if not revisions:
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8", errors="replace").strip()[:80].replace("/", "_")
        if named in revisions:
            return named
    if len(revisions) > 1:
        raise UserError(f"{str(folder)!r} holds {len(revisions)} revisions: give the folder of one, under snapshots/")
    return revisions[0]


def detect_format(folder: Path) -> str:
    """The format of a folder.

    Raises:
        UserError: there is no such folder, or none of the formats fits; says what was looked for.
    """
    if not folder.is_dir():
        raise UserError(f"source {str(folder)!r} is no folder: give the data set's own folder")
    for name in FORMATS:
        if source_of(name).detect(folder):
            return name
    looked = "; ".join(f"{name}: {source_of(name).LOOKS_FOR}" for name in FORMATS)
    raise UserError(
        f"source {str(folder)!r} is in none of the known formats: it holds {_holds(folder)}. Looked for {looked}. "
        "Name one by --format"
    )


def _holds(folder: Path) -> str:
    """What a folder's files are, by their suffixes, in words."""
    kinds = Counter(met.left or met.path.suffix.lower() or "without a suffix" for met in walk(folder))
    if not kinds:
        return "no files"
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
    return told + (" (archives are not opened: unpack them)" if set(kinds) & set(ARCHIVES.split()) else "")
