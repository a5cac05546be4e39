"""The unit of an import: a few recordings of one split to one shard, by a worker, whole or not at all.

A job's files carry a digest of all that it was made from (recordings, sizes and times of their files, options). So a
broken import finds what it has done already, and whatever has changed since is done again.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.data.decode import DecodeError
from anyflow.data.faults import NotColourError
from anyflow.data.importing.cutting import CutReport, Cutting, cut
from anyflow.data.importing.formats.known import source_of
from anyflow.data.importing.recording import Recording, Unusable, files_of
from anyflow.data.shards import Shard, shard_from_dict, shard_to_dict, write_tar
from anyflow.errors import UserError, first_line
from anyflow.system.files import placing

JOB_VERSION = 4
PARSE_ERRORS = (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError)
"""What libraries raise when they parse damaged files; it concerns that recording alone."""
MOST_VALUES = 20
"""A label with more values than this is not listed on the card."""


@dataclass(frozen=True)
class ShardJob:
    """What a worker is given.

    Attributes:
        folder: the source's. format: its importer. work: where the shard and the result are written.
        split: of all the recordings. domain, licence: of the clips.
    """

    folder: Path
    format: str
    work: Path
    split: str
    domain: str
    licence: str
    cutting: Cutting
    recordings: tuple[Recording, ...]

    @property
    def digest(self) -> str:
        """Names the job's files: the same for the same input and options."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([JOB_VERSION, self.format, self.split, self.domain, self.licence]).encode())
        digest.update(json.dumps(dataclasses.asdict(self.cutting), sort_keys=True).encode())
        for recording in self.recordings:
            _add(digest, dataclasses.asdict(recording))
            for path in _files(recording):
                try:
                    stat = path.stat()
                    _add(digest, [stat.st_size, stat.st_mtime_ns])
                except OSError:
                    _add(digest, None)
        return digest.hexdigest()


@dataclass(frozen=True)
class ShardResult:
    """What a worker made.

    Attributes:
        digest: the job's. shard: None if no clip came of it.
        prints: of the shard's clips, uint8 [N, D].
        unusable: recordings that gave no clip, for they could not be read.
        dropped: clips left out, by reason. scenes: cuts seen.
        attributes: label -> its values, up to MOST_VALUES + 1 of them.
        controls: those that at least one clip has.
        without: recordings that gave no clip though they could be read -> why.
        notes: what had to be guessed or converted -> the recordings that it was.
    """

    digest: str
    shard: Shard | None
    prints: np.ndarray
    unusable: tuple[Unusable, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    scenes: int = 0
    attributes: Mapping[str, list[str]] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)


def run_job(job: ShardJob) -> ShardResult:
    """Do a job, unless it is done already."""
    digest = job.digest
    done = load_result(job.work, digest)
    if done is not None:
        return done
    writer = _Writer(job)
    tar = job.work / f"{digest}.tar"
    with placing(tar) as place:  # a worker that was believed lost may still be at it
        shard: Shard | None = write_tar(writer.samples(), place)
    assert shard is not None
    if not shard.samples:
        tar.unlink(missing_ok=True)
        shard = None
    result = ShardResult(
        digest,
        shard,
        np.stack(writer.prints) if writer.prints else np.zeros((0, 1), dtype=np.uint8),
        tuple(writer.unusable),
        dict(sorted(writer.report.dropped.items())),
        writer.report.scenes,
        {name: sorted(values)[: MOST_VALUES + 1] for name, values in sorted(writer.attributes.items())},
        tuple(sorted(writer.controls)),
        writer.without,
        {text: list(names) for text, names in sorted(writer.report.notes.items())},
    )
    with placing(job.work / f"{digest}.json") as place:
        place.write_text(json.dumps(_to_dict(result)))
    return result


def load_result(work: Path, digest: str) -> ShardResult | None:
    """The result of a job that was done before, if its shard is there as well."""
    try:
        result = _from_dict(json.loads((work / f"{digest}.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    shard = result.shard
    if shard is not None:
        tar = work / shard.name
        if not tar.is_file() or tar.stat().st_size != shard.bytes:
            return None
    return result


class _Writer:
    """Turns a job's recordings into samples, and remembers what else became of them."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.source = source_of(job.format)
        self.prints: list[np.ndarray] = []
        self.unusable: list[Unusable] = []
        self.without: dict[str, str] = {}
        self.report = CutReport()
        self.attributes: dict[str, set[str]] = {}
        self.controls: set[str] = set()

    def samples(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, members) of every clip."""
        for recording in self.job.recordings:
            yield from self._recording(recording)

    def _recording(self, recording: Recording) -> Iterator[tuple[str, dict[str, bytes]]]:
        job = self.job
        clips, dropped = 0, self.report.dropped.copy()
        try:
            tracks = self.source.controls(job.folder, recording)
            for made in cut(recording, job.cutting, job.domain, job.licence, tracks, self.report):
                parts = made.clip.parts()
                self.prints.append(made.print)
                self._remember(made.clip.attributes, made.clip.controls)
                clips += 1
                yield made.clip.key, parts
            if not clips:
                reasons = (self.report.dropped - dropped).most_common(1)
                self.without[recording.name] = reasons[0][0] if reasons else "too short"
        except NotColourError as error:
            self.without[recording.name] = str(error)
        except (DecodeError, UserError, *PARSE_ERRORS) as error:
            if clips:
                self.report.note(recording.name, f"broken off after clips that were taken: {first_line(error)}")
            else:
                self.unusable.append(Unusable(recording.name, first_line(error)))

    def _remember(self, attributes: Mapping[str, Any], controls: Mapping[str, Any]) -> None:
        self.controls.update(controls)
        for name, value in attributes.items():
            values = self.attributes.setdefault(name, set())
            if len(values) <= MOST_VALUES:
                values.add(str(value)[:100])


def _files(recording: Recording) -> list[Path]:
    """The files that a recording's clips come from: the footage, and those that its details name."""
    named = (value for value in recording.details.values() if isinstance(value, str))
    return [Path(path) for path in (*files_of(recording.footage), *named)]


def _add(digest: Any, value: Any) -> None:
    """Hash a value made of mappings, sequences, arrays and plain values."""
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        digest.update(b"{")
        for name, item in sorted(value.items()):
            _add(digest, name)
            _add(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{type(value).__name__}:{value!r};".encode())


def _to_dict(result: ShardResult) -> dict[str, Any]:
    return {
        "digest": result.digest,
        "shard": shard_to_dict(result.shard) if result.shard else None,
        "prints": [base64.b64encode(row.tobytes()).decode() for row in result.prints] if result.shard else [],
        "unusable": [[item.name, item.reason] for item in result.unusable],
        "dropped": dict(result.dropped),
        "scenes": result.scenes,
        "attributes": dict(result.attributes),
        "controls": list(result.controls),
        "without": dict(result.without),
        "notes": dict(result.notes),
    }


def _from_dict(document: dict[str, Any]) -> ShardResult:
    rows = [np.frombuffer(base64.b64decode(row), dtype=np.uint8) for row in document["prints"]]
    return ShardResult(
        document["digest"],
        shard_from_dict(document["shard"]) if document["shard"] else None,
        np.stack(rows) if rows else np.zeros((0, 1), dtype=np.uint8),
        tuple(Unusable(name, reason) for name, reason in document["unusable"]),
        document["dropped"],
        document["scenes"],
        document["attributes"],
        tuple(document["controls"]),
        document["without"],
        document["notes"],
    )
