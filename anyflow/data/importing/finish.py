"""The end of an import: duplicates leave, shards take their names, index, card and report are written."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anyflow.data.card import CARD_NAME, DatasetCard, write_card
from anyflow.data.clip import SPLITS
from anyflow.data.control_ranges import measured_controls
from anyflow.data.controls import Control
from anyflow.data.importing.cutting import Cutting, find_duplicates
from anyflow.data.importing.heldout import group_of, settle
from anyflow.data.importing.jobs import MOST_VALUES, ShardJob, ShardResult
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Found, LeftOut, Recording, Unread, Unusable
from anyflow.data.importing.survey import NAMED, Survey
from anyflow.data.shards import INDEX_NAME, Shard, ShardIndex, write_tar
from anyflow.errors import UserError
from anyflow.system.files import write_atomically

T = TypeVar("T", LeftOut, Unread)

REPORT_NAME = "import.json"
EXAMPLES = 3
"""Recordings that a note names."""
MOST_NAME = 100
"""Bytes of the data set's name in those of its shards, which disks bound."""


@dataclass(frozen=True)
class Import:
    """What an import is of: where from, where to, how it cuts, what was found, how cameras lie."""

    source: Path
    format: str
    out: Path
    work: Path
    cutting: Cutting
    options: ImportOptions
    controls: Mapping[str, Control | str]
    found: Sequence[Found]
    files: Survey | None
    notes: tuple[str, ...] = ()
    views: str = ""


@dataclass(frozen=True)
class ImportReport:
    """What an import made.

    Attributes:
        card: the new card's path. format: the source's.
        clips: split -> clips. recordings: those asked for, usable or not.
        unusable: (recording, reason), every one. dropped: clips left out, by reason. scenes: cuts seen.
        found: recordings in the source = ``taken``, of which there is a clip, + all of ``left_out``, by reason.
        files: found = footage + descriptions + left out by reason; empty where not all were looked at (``--limit``).
        unread: (file or recording, reason) of what is no fault, the first of each reason.
        without: (recording, reason) of those that could be read, and gave no clip.
        notes: what else is to be known, in sentences: what had to be guessed or converted, for example.
        views: how several cameras lie in one picture, row by row; empty where they are apart.
    """

    card: Path
    format: str
    clips: Mapping[str, int]
    recordings: int
    unusable: tuple[tuple[str, str], ...]
    dropped: Mapping[str, int]
    scenes: int
    found: int = 0
    taken: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[tuple[str, str], ...] = ()
    without: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    views: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the card's path, so that a report is the same wherever it was made."""
        document = asdict(self)
        del document["card"]
        return document

    @classmethod
    def load(cls, folder: Path) -> ImportReport:
        """The report that lies in an imported data set."""
        document = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        for name in ("unusable", "unread", "without"):
            document[name] = tuple(tuple(item) for item in document.get(name, ()))
        document["notes"] = tuple(document.get("notes", ()))
        return cls(card=folder / CARD_NAME, **document)


def assemble(
    imported: Import, jobs: Sequence[ShardJob], results: Sequence[ShardResult], unusable: Sequence[Unusable]
) -> ImportReport:
    """Put the jobs' shards together as the data set; it may be broken off and called again at any point.

    Raises:
        UserError: a split came out empty.
    """
    dropped: Counter[str] = Counter()
    for result in results:
        dropped.update(result.dropped)
    repeats = set() if imported.options.keep_duplicates else _repeats(results)
    dropped.update({"duplicate": len(repeats)} if repeats else {})
    splits, notes = settle(jobs, group_of(jobs, results, repeats), imported.options)
    final = imported.work / "final"
    clips: dict[str, int] = {}
    for split in SPLITS:
        if any(job.split == split for job in jobs):
            keys = {key for key, of in splits.items() if of == split}
            clips[split] = _write_split(imported, split, results, keys, final / split)
            if not clips[split]:
                reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
                raise UserError(
                    f"no clip of {imported.cutting.frames} frames came out for the split {split!r} (left out: "
                    f"{reasons or 'nothing'}): lower --frames or --min-motion, or import more"
                )
    named = [*unusable, *(item for result in results for item in result.unusable)]
    taken, left_out = _account(imported, jobs, results, set(splits), len(unusable))
    card = _card(imported, final, list(clips), results)
    controls, told = measured_controls(card)
    files = imported.files
    report = ImportReport(
        imported.out / CARD_NAME,
        imported.format,
        clips,
        _asked_for(imported),
        _told(named),
        dict(sorted(dropped.items())),
        sum(result.scenes for result in results),
        sum(not isinstance(item, Unread) for item in imported.found),
        taken,
        left_out,
        files.counts if files else {},
        _told([*(files.unread if files else _first(imported.found, Unread)), *_first(imported.found, LeftOut)]),
        tuple((_written(name), reason) for result in results for name, reason in result.without.items()),
        tuple(map(_written, (*imported.notes, *notes, *told, *_notes(results)))),
        imported.views,
    )
    _write_card(replace(card, controls=controls), final)
    write_report(final / REPORT_NAME, report.to_dict())
    _move(final, imported.out)
    shutil.rmtree(imported.work, ignore_errors=True)  # another import may just be looking into it
    return report


def _move(final: Path, out: Path) -> None:
    """Put the data set in its place.

    Raises:
        UserError: something else has taken it.
    """
    try:
        if out.is_dir():
            out.rmdir()  # empty, as was checked
        final.rename(out)
    except OSError as error:
        if not out.exists():
            raise
        again = "remove it, or give another --to, and start again with the same words to go on"
        raise UserError(f"--to {str(out)!r} was taken by something else meanwhile: {again}") from error


def _notes(results: Sequence[ShardResult]) -> Iterator[str]:
    """What had to be guessed or converted, a sentence each, with the first recordings that it was."""
    notes: dict[str, list[str]] = {}
    for result in results:
        for text, names in result.notes.items():
            notes.setdefault(text, []).extend(names)
    for text, names in sorted(notes.items()):
        more = ", ..." if len(names) > EXAMPLES else ""
        yield f"{text} ({len(names)}: {', '.join(names[:EXAMPLES])}{more})"


def _asked_for(imported: Import) -> int:
    return sum(isinstance(item, Recording | Unusable) for item in imported.found)


def _first(found: Sequence[Found], kind: type[T]) -> list[T]:
    """Those of a kind, the first of each reason."""
    counts: Counter[str] = Counter()
    first = []
    for item in found:
        if isinstance(item, kind):
            counts[item.reason] += 1
            first += [item] if counts[item.reason] <= NAMED else []
    return first


def _told(items: Sequence[Unusable | LeftOut | Unread]) -> tuple[tuple[str, str], ...]:
    return tuple((_written(item.name), item.reason) for item in items)


def _written(text: str) -> str:
    """A text that can be written: names of files may hold any bytes."""
    return text.encode(errors="replace").decode()


def _account(
    imported: Import, jobs: Sequence[ShardJob], results: Sequence[ShardResult], clips: set[str], unusable: int
) -> tuple[int, dict[str, int]]:
    """(recordings that a clip is taken of, the others by why none is)."""
    left_out = Counter(item.reason.partition(", ")[0] for item in imported.found if isinstance(item, LeftOut))
    left_out["unusable"] += unusable
    taken = 0
    for job, result in zip(jobs, results, strict=True):
        keys = {sample.key for sample in result.shard.samples} if result.shard else set()
        made, kept = ({key.rpartition("-")[0] for key in some} for some in (keys, keys & clips))
        for recording in job.recordings:
            if recording.key in kept:
                taken += 1
            else:
                left_out["duplicate" if recording.key in made else result.without.get(recording.name, "unusable")] += 1
    return taken, {reason: count for reason, count in sorted(left_out.items()) if count}


def _repeats(results: Sequence[ShardResult]) -> set[str]:
    """Keys of clips that show what an earlier one shows."""
    keys = [sample.key for result in results if result.shard for sample in result.shard.samples]
    prints = [result.prints for result in results if result.shard]
    if not keys:
        return set()
    return {keys[later] for later, _ in find_duplicates(np.concatenate(prints))}


def _write_split(imported: Import, split: str, results: Sequence[ShardResult], keys: set[str], folder: Path) -> int:
    """Move a split's shards to their place, with its clips alone, and index them; returns the number of clips."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    name = imported.out.name.encode(errors="replace")[:MOST_NAME].decode(errors="ignore")
    for result in results:
        kept = {sample.key for sample in result.shard.samples} & keys if result.shard else set()
        if result.shard is None or not kept:
            continue
        tar = imported.work / result.shard.name
        place = folder / f"{name}-{split}-{len(shards):06d}.tar"
        if len(kept) < len(result.shard.samples):
            # The original stays until all is done: a broken import is assembled again from it.
            shards.append(write_tar(_samples(tar, kept), place))
        else:
            place.unlink(missing_ok=True)
            try:
                place.hardlink_to(tar)
            except OSError:  # a file system without links
                shutil.copyfile(tar, place)
            shards.append(replace(result.shard, name=place.name))
    index = ShardIndex(tuple(shards)).to_dict()
    write_atomically(folder / INDEX_NAME, json.dumps(index, separators=(",", ":")))
    return sum(len(shard.samples) for shard in shards)


def _samples(tar: Path, kept: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard of ours, in order, less those that are not ``kept``."""
    with tarfile.open(tar) as file:
        key = ""
        parts: dict[str, bytes] = {}
        for member in file:
            name, _, extension = member.name.partition(".")
            if name != key and parts:
                yield key, parts
                parts = {}
            key = name
            data = file.extractfile(member)
            if name in kept and data is not None:
                parts[extension] = data.read()
        if parts:
            yield key, parts


def _write_card(card: DatasetCard, final: Path) -> None:
    write_card(card, final / CARD_NAME)


def _card(imported: Import, final: Path, splits: Sequence[str], results: Sequence[ShardResult]) -> DatasetCard:
    """The card, without the ranges of controls."""
    present = {name for result in results for name in result.controls}
    labels: dict[str, set[str]] = {}
    for result in results:
        for name, values in result.attributes.items():
            labels.setdefault(name, set()).update(values)
    cutting, options = imported.cutting, imported.options
    seen = f" Every picture shows the cameras {imported.views}." if imported.views else ""
    return DatasetCard(
        name=imported.out.name,
        domain=options.domain or "",
        description=options.description
        or f"Footage of {imported.source.name}, imported from the format {imported.format}.{seen}",
        splits={split: final / split for split in splits},
        frames=cutting.frames,
        height=cutting.height,
        width=cutting.width,
        fps=cutting.fps,
        licence=options.licence or "not stated: see the source",
        caption=options.default_caption,
        controls={name: imported.controls.get(name, "one value a frame") for name in sorted(present)},
        attributes={
            name: sorted(values) if len(values) <= MOST_VALUES else f"more than {MOST_VALUES} values"
            for name, values in sorted(labels.items())
        },
        provenance={
            "command": f"anyflow data import {imported.source} --to {imported.out}",
            "format": imported.format,
            "recordings": _asked_for(imported),
            "cutting": asdict(cutting),
            **({"views": imported.views} if imported.views else {}),
        },
    )


def write_report(path: Path, document: Mapping[str, Any]) -> None:
    """A report, as JSON that people can read."""
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False, default=str).encode(errors="replace"))
