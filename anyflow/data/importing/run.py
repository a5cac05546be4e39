"""``anyflow data import``: footage in somebody's format to shards, a card and a held-out split.

What is written depends on the source and the options alone, not on the number of workers or on interruptions. All work
lies in ``.NAME.import`` beside the target until everything is there; then it takes its place at once. A broken import
goes on from the jobs that it had finished.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from anyflow.data.card import CARD_NAME
from anyflow.data.clip import SPLITS
from anyflow.data.decode import DecodeError
from anyflow.data.faults import NotColourError
from anyflow.data.importing.captions import DEFAULTS, Captions, captions_of, notes_on
from anyflow.data.importing.cutting import Cutting
from anyflow.data.importing.finish import REPORT_NAME, Import, ImportReport, assemble, write_report
from anyflow.data.importing.footage import Facts
from anyflow.data.importing.formats.huggingface import licence_of
from anyflow.data.importing.formats.known import controls_of, detect_format, snapshot, source_of
from anyflow.data.importing.heldout import count_of, in_order_of_draw
from anyflow.data.importing.jobs import PARSE_ERRORS, ShardJob, ShardResult, load_result, run_job
from anyflow.data.importing.options import ImportOptions
from anyflow.data.importing.recording import Found, LeftOut, Recording, Unread, Unusable
from anyflow.data.importing.survey import Survey, survey
from anyflow.data.importing.views import APART, described, probe, together
from anyflow.data.importing.walk import listed_once
from anyflow.errors import UserError, first_line
from anyflow.system.engines import Engine, Work, values
from anyflow.system.locks import claimed
from anyflow.system.pool import LocalEngine

CLIPS_PER_JOB = 100
PROBED = 8
"""Recordings whose length is looked up to guess how many make a shard."""
HEADERS = 1000
"""Recordings whose headers are looked at when an import stops, for others that cannot be used."""
NAMED = 5


@dataclass(frozen=True)
class Progress:
    """How far an import is: recordings done of all, clips made, and seconds left (None: not known yet)."""

    recordings: int
    of: int
    clips: int
    clips_per_second: float
    seconds_left: float | None


@listed_once()
def import_dataset(
    source: Path,
    out: Path,
    options: ImportOptions,
    progress: Callable[[Progress], None] | None = None,
    engine: Engine | None = None,
) -> ImportReport:
    """Import a folder; go on where an earlier call was broken off.

    Args:
        source: the data set's folder.
        out: the new data set's folder.
        progress: called after every job.
        engine: who works; without it ``options.workers`` processes of this machine.

    Raises:
        UserError: the folder is in no known format, ``out`` is in use, nothing usable is found, or more recordings
            than the budget allows cannot be used; these are all named in the report then.
    """
    options.check()
    captions = captions_of(options, source.absolute())
    work = out.with_name(f".{out.name}.import")
    if not work.is_dir():
        _refuse_in_use(out)
    folder = snapshot(source.absolute())
    name = options.format or detect_format(folder)
    module = source_of(name)
    if not folder.is_dir() or not module.detect(folder):
        raise UserError(f"source {str(source)!r} is not in the format {name!r}, which has {module.LOOKS_FOR}")
    options = _with_domain(options, module.DOMAIN)
    options = replace(options, licence=options.licence or licence_of(folder))
    captions = replace(captions, default=options.default_caption)
    try:
        with claimed(work):
            try:
                if _has_work(work) and (out / CARD_NAME).is_file():  # stopped between the last two steps
                    shutil.rmtree(work)
                    return ImportReport.load(out)
                _refuse_in_use(out)
                does = engine or LocalEngine(options.workers)
                return _import(source, folder, name, out, work, options, captions, progress, does)
            finally:
                if work.is_dir() and not _has_work(work):
                    shutil.rmtree(work, ignore_errors=True)  # nothing is done yet, so nothing is left
    except BlockingIOError as error:
        raise UserError(f"another import is writing {str(out)!r}: wait for it, or give another --to") from error


def _refuse_in_use(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--to {str(out)!r} is in use: give another folder, or remove it first")


def _has_work(work: Path) -> bool:
    return any(path.name != "lock" for path in work.iterdir())


def _import(
    source: Path,
    folder: Path,
    format: str,
    out: Path,
    work: Path,
    options: ImportOptions,
    captions: Captions,
    progress: Callable[[Progress], None] | None,
    engine: Engine,
) -> ImportReport:
    """The import itself, in a working folder of this process's own."""
    module = source_of(format)
    try:
        found = list(_limited(together(module.recordings(folder), options.views, options.cameras), options))
    except (DecodeError, *PARSE_ERRORS) as error:
        raise UserError(f"source {str(source)!r} cannot be read ({format}): {first_line(error)}") from error
    files = None if options.limit else survey(folder, format, found)
    recordings, unusable = _choose(captions.apply(found), options)
    total = len(recordings) + len(unusable)
    enforce(unusable, total, options.error_budget, work, captions.why(found))
    if not recordings:
        raise UserError(f"source {str(source)!r} holds no recordings ({format}: {module.LOOKS_FOR})")
    cutting, facts = _cutting(recordings, options)
    notes = tuple(_notes(options, captions, found, recordings, files))
    controls, views = controls_of(module, folder), described(recordings)
    imported = Import(source, format, out, work, cutting, options, controls, found, files, notes, views)
    jobs = list(_jobs(imported, folder, split_groups(recordings, options), facts))
    results = _run(jobs, unusable, options, total, progress, engine)
    return assemble(imported, jobs, results, unusable)


def _notes(
    options: ImportOptions,
    captions: Captions,
    found: Sequence[Found],
    recordings: Sequence[Recording],
    files: Survey | None,
) -> Iterator[str]:
    """What is to be known of an import besides its numbers."""
    if files is None:
        yield f"--limit {options.limit}: what comes after so many recordings was not looked at"
    elif captions.file is not None:
        yield from captions.file.notes(found)
    yield from notes_on(found, recordings)
    if files is not None and files.odd:
        more = ", ..." if len(files.odd) > NAMED else ""
        yield f"read as what they are, not as their names end: {', '.join(files.odd[:NAMED])}{more}"


def _with_domain(options: ImportOptions, usual: str) -> ImportOptions:
    domain, default = options.domain or usual, options.default_caption
    if default == "domain":
        if domain not in DEFAULTS:
            raise UserError(f"--default-caption domain: {domain!r} has none, only {', '.join(DEFAULTS)}; write it out")
        default = DEFAULTS[domain]
    return replace(options, domain=domain, default_caption=default)


def _limited(found: Iterable[Found], options: ImportOptions) -> Iterator[Found]:
    """The recordings asked for, by camera and number; the same name twice is refused."""
    seen: set[str] = set()
    cameras: set[str] = set()
    count = 0
    for item in found:
        if isinstance(item, Recording):
            cameras.add(item.camera)
            if options.cameras and options.views == APART and item.camera not in options.cameras:
                yield LeftOut(item.name, f"another camera ({item.camera or 'without a name'})", item.footage)
                continue
            if item.key in seen:
                item = Unusable(item.name, "the source names it twice")
            else:
                seen.add(item.key)
        yield item
        count += isinstance(item, Recording | Unusable)
        if options.limit and count >= options.limit:
            return
    missing = sorted(set(options.cameras) - cameras)
    if missing and options.views == APART:
        raise UserError(f"--cameras {','.join(missing)}: the source has {', '.join(sorted(cameras)) or 'no cameras'}")


def _choose(found: Iterable[Found], options: ImportOptions) -> tuple[list[Recording], list[Unusable]]:
    """Give groups; part the usable from the rest."""
    recordings: list[Recording] = []
    unusable: list[Unusable] = []
    for item in found:
        if isinstance(item, LeftOut | Unread):
            continue
        if isinstance(item, Unusable):
            unusable.append(item)
        elif options.group_by is None:
            recordings.append(item)
        elif item.fields.get(options.group_by) in (None, ""):
            unusable.append(Unusable(item.name, f"no field {options.group_by!r} to group it by"))
        else:
            recordings.append(replace(item, group=str(item.fields[options.group_by])))
    return recordings, unusable


def split_groups(recordings: Sequence[Recording], options: ImportOptions) -> dict[str, list[Recording]]:
    """{"train": ..., "heldout": ...}: by the source's own split if it has one, else whole groups drawn by the seed.

    Raises:
        UserError: there are too few groups to hold any out.
    """
    if options.heldout == 0:
        return {"train": list(recordings)}
    if any(recording.split == "heldout" for recording in recordings):
        held = {recording.group for recording in recordings if recording.split == "heldout"}
    else:
        groups = {recording.group for recording in recordings}
        if len(groups) < 2:
            raise UserError(
                "--heldout: all recordings are of one group, so none can be held out whole; import more, "
                "name a field by --group-by, or give --heldout 0"
            )
        held = set(in_order_of_draw(groups, options.seed)[: count_of(len(groups), options.heldout)])
    parts: dict[str, list[Recording]] = {split: [] for split in SPLITS}
    for recording in recordings:
        parts["heldout" if recording.group in held else "train"].append(recording)
    return parts


def _cutting(recordings: Sequence[Recording], options: ImportOptions) -> tuple[Cutting, list[Facts]]:
    """The options with what the first readable recordings tell: rate, size, and how long recordings are.

    Raises:
        UserError: none of the first ones can be read.
    """
    facts: list[Facts] = []
    reason = ""
    for recording in recordings[: 8 * PROBED]:
        try:
            facts.append(probe(recording))
        except DecodeError as error:
            reason = f"{recording.name}: {error}"
        if len(facts) == PROBED:
            break
    if not facts:
        raise UserError(f"none of the first recordings can be read ({reason}): check the source")
    # Those of most: an odd one that happens to be the first shapes no other.
    fps = options.fps or Counter(round(fact.fps, 3) for fact in facts).most_common(1)[0][0]
    sizes = Counter((fact.width // 2 * 2, fact.height // 2 * 2) for fact in facts)
    width, height = options.size or sizes.most_common(1)[0][0]
    stride = options.frames if options.stride is None else max(1, round(options.stride * fps))
    cutting = Cutting(
        options.frames, fps, height, width, stride, options.scene_cuts, options.min_motion, options.clips, options.seed
    )
    return cutting, facts


def _jobs(
    imported: Import, folder: Path, parts: dict[str, list[Recording]], facts: Sequence[Facts]
) -> Iterator[ShardJob]:
    """The recordings of each split in runs that make about one shard; held-out first, so that it keeps duplicates."""
    options = imported.options
    lengths = [fact.seconds for fact in facts if fact.seconds is not None]
    clips = sum(map(imported.cutting.expected, lengths)) / len(lengths) if lengths else 1.0
    size = max(1, round(CLIPS_PER_JOB / max(clips, 1.0)))
    for split in reversed([split for split in SPLITS if split in parts]):
        for start in range(0, len(parts[split]), size):
            run = tuple(parts[split][start : start + size])
            yield ShardJob(
                folder,
                imported.format,
                imported.work,
                split,
                options.domain or "",
                options.licence,
                imported.cutting,
                run,
            )


def _run(
    jobs: Sequence[ShardJob],
    unusable: Sequence[Unusable],
    options: ImportOptions,
    total: int,
    progress: Callable[[Progress], None] | None,
    engine: Engine,
) -> list[ShardResult]:
    """Every job's result, in order; those of a broken import are taken over.

    Raises:
        UserError: the budget is spent, or jobs kill their workers.
    """
    known = [load_result(job.work, job.digest) for job in jobs]
    done = sum(len(job.recordings) for job, result in zip(jobs, known, strict=True) if result)
    clips = sum(_count(result) for result in known if result)
    bad = [*unusable, *(item for result in known if result for item in result.unusable)]
    open_jobs = [(place, job) for place, (job, result) in enumerate(zip(jobs, known, strict=True)) if result is None]
    of = sum(len(job.recordings) for job in jobs)
    started, made, read = time.monotonic(), 0, 0
    enforce(bad, total, options.error_budget, jobs[0].work)
    work = Work(run_job, sees=(jobs[0].folder,), writes=jobs[0].work)
    done_again = "lower --workers or --size, and start it again with the same words to go on"
    ends = engine.map_unordered(work, [job for _, job in open_jobs])
    with closing(values(ends, lambda number: open_jobs[number][1].recordings[0].name, done_again)) as results:
        for number, result in results:
            place, job = open_jobs[number]
            known[place] = result
            bad += result.unusable
            made, read = made + _count(result), read + len(job.recordings)
            seconds = time.monotonic() - started
            left = seconds / read * (of - done - read)
            if progress is not None:
                progress(Progress(done + read, of, clips + made, made / seconds, left))
            if len(bad) > options.error_budget * total:
                bad += _further_bad(jobs, known)
            enforce(bad, total, options.error_budget, job.work)
    return [result for result in known if result is not None]


def _further_bad(jobs: Sequence[ShardJob], known: Sequence[ShardResult | None]) -> Iterator[Unusable]:
    """Those of the recordings not read yet whose headers are bad: an import that stops names them with the others."""
    left = (
        recording for job, result in zip(jobs, known, strict=True) if result is None for recording in job.recordings
    )
    for recording in islice(left, HEADERS):
        try:
            probe(recording)
        except NotColourError:
            continue
        except DecodeError as error:
            yield Unusable(recording.name, str(error))


def _count(result: ShardResult) -> int:
    return len(result.shard.samples) if result.shard else 0


def enforce(unusable: Sequence[Unusable], total: int, budget: float, work: Path, why: str = "") -> None:
    """Compare the unusable recordings with all of them.

    Args:
        why: what may be behind it, in words.

    Raises:
        UserError: there are more than the budget allows; the first are named, and all of them in a file.
    """
    if not unusable or len(unusable) <= budget * total:
        return
    report = work / REPORT_NAME
    write_report(report, {"unusable": [[item.name, item.reason] for item in unusable]})
    named = "; ".join(f"{item.name[:200]} ({item.reason})" for item in unusable[:NAMED])
    rest = f"; and {len(unusable) - NAMED} more, all in {str(report)!r}" if len(unusable) > NAMED else ""
    behind = f"; {why}" if why else ""
    raise UserError(
        f"{len(unusable)} of {total} recordings cannot be used, more than --error-budget {budget:g} allows: "
        f"{named}{rest}{behind}; mend them or raise the budget, and start again with the same words to go on"
    )
