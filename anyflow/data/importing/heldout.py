"""What is held out: whole groups, drawn by the seed, among those that clips came of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from anyflow.data.importing.jobs import ShardJob, ShardResult
from anyflow.data.importing.options import ImportOptions


def in_order_of_draw(groups: Iterable[str], seed: int) -> list[str]:
    """Groups in an order that is the seed's alone: what is added or left out moves no other."""
    return sorted(
        groups,
        key=lambda group: hashlib.blake2b(f"{seed}/{group}".encode(errors="surrogateescape"), digest_size=16).digest(),
    )


def count_of(groups: int, share: float) -> int:
    """How many of so many groups are held out: at least one, and never all."""
    return min(groups - 1, max(1, round(share * groups)))


def group_of(jobs: Sequence[ShardJob], results: Sequence[ShardResult], repeats: set[str]) -> dict[str, str]:
    """Clip -> its recording's group, of all clips but the repeats."""
    groups = {recording.key: recording.group for job in jobs for recording in job.recordings}
    keys = (sample.key for result in results if result.shard for sample in result.shard.samples)
    return {key: groups[key.rpartition("-")[0]] for key in keys if key not in repeats}


def settle(
    jobs: Sequence[ShardJob], clips: Mapping[str, str], options: ImportOptions
) -> tuple[dict[str, str], list[str]]:
    """Say of every clip in which split it is, now that it is known which groups gave any.

    What was held out before stays so, and groups that gave nothing are made up for by the next ones of the draw.

    Args:
        jobs: all. clips: key -> group.

    Returns:
        (clip -> split, what is to be told of it).
    """
    if options.heldout == 0 or not any(job.split == "heldout" for job in jobs):
        return dict.fromkeys(clips, "train"), []
    named = {recording.group for job in jobs if job.split == "heldout" for recording in job.recordings}
    own = any(recording.split == "heldout" for job in jobs for recording in job.recordings)
    order = in_order_of_draw(set(clips.values()), options.seed)
    held = [group for group in order if group in named]
    notes = []
    if not (own and held):
        count = count_of(len(order), options.heldout)
        instead = order[: max(count, min(len(held), len(order) - 1))]
        if own:
            notes.append(f"the source's own held-out recordings gave no clip: {len(instead)} others were drawn")
        held = instead
    groups = set(held)
    return {clip: "heldout" if group in groups else "train" for clip, group in clips.items()}, notes
