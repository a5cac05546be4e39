"""How often the numbers of a control take which values, for people."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyflow.data.control_ranges import Seen
from anyflow.data.controls import Control

BINS = 16


def coverage(control: Control, seen: Seen | None) -> list[dict[str, Any]]:
    """How often each number takes which values: name, unit, from, to, and the counts of ``BINS`` equal parts between.

    The range is the card's, else that of the entries; what lies ``beyond`` it (a share) counts to the first and the
    last part. ``unknown`` is the share of entries without the number, ``still`` whether it never changes.
    """
    rows = np.concatenate(seen.rows.get(control.width, [])) if seen and control.width in seen.rows else None
    facts = []
    for number in range(control.width):
        values = rows[:, number] if rows is not None else np.empty(0)
        entries, values = len(values), values[~np.isnan(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
        if control.low:
            low, high = control.low[number], control.high[number]
        beyond = float(((values < low) | (values > high)).mean()) if len(values) else 0.0
        counts = np.histogram(values.clip(low, high), BINS, (low, high))[0] if len(values) else np.zeros(BINS)
        unit = control.unit[number] if control.unit else ""
        fact = {"name": control.called(number), "unit": unit, "from": low, "to": high}
        unknown = 1 - len(values) / entries if entries else 0.0
        is_still = len(values) > 1 and float(np.ptp(values)) == 0
        more = {"beyond": beyond, "unknown": unknown, "still": is_still}
        facts.append({**fact, "counts": counts.astype(int).tolist(), **more})
    return facts
