"""Clips that could not be used: named, counted, and kept within a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from anyflow.errors import UserError
from anyflow.system.files import write_atomically

BUDGET_FLOOR = 1000
"""The budget is counted against at least this many clips: one bad clip among the first ten does not make 10 %."""
NAMED_OFFENDERS = 5
MAX_TRIES = 64
"""Replacements that are tried for one bad clip."""


@dataclass(frozen=True)
class Skip:
    """A clip that could not be used, and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key} ({self.reason})"


def enforce_budget(
    skipped: Sequence[Skip], read: int, total: int, error_budget: float, report: Path | None = None
) -> None:
    """Compare the distinct bad clips with the clips read so far.

    Args:
        skipped: the bad clips, each once.
        read: clips read so far.
        total: clips there are.
        error_budget: largest share that is tolerated.
        report: file that names all of them then.

    Raises:
        UserError: the budget is spent; names the first offenders.
    """
    if len(skipped) > error_budget * min(max(read, BUDGET_FLOOR), total):
        if report is not None:
            write_skipped(report, skipped)
        everywhere = f"; all of them in {str(report)!r}" if report is not None else ""
        raise UserError(
            f"{len(skipped)} of {total} clips cannot be used, more than error_budget {error_budget:g} allows: "
            f"{_name_offenders(skipped)}{everywhere}; repair the shards or raise error_budget."
        )


def none_usable(bad: Sequence[Skip]) -> UserError:
    """What to raise where no clip can take the place of bad ones."""
    return UserError(f"{len(bad)} clips in a row cannot be used: {_name_offenders(bad)}; repair the shards.")


def write_skipped(path: Path, skipped: Iterable[Skip]) -> None:
    """Name every clip that could not be used, and why, in a JSON file for people."""
    write_atomically(path, json.dumps([asdict(skip) for skip in skipped], indent=1, ensure_ascii=False).encode())


def _name_offenders(skipped: Sequence[Skip]) -> str:
    named = "; ".join(str(skip) for skip in skipped[:NAMED_OFFENDERS])
    rest = len(skipped) - NAMED_OFFENDERS
    return named + (f"; and {rest} more" if rest > 0 else "")
