"""Which clips are whose: the one place that says how ranks stand to the data.

Neighbouring ranks may share each clip (context parallelism, ``backbone/context.py``). They see the same clips, draw the
same random numbers, and count as one wherever clips are dealt out, counted or averaged over: one data rank.
"""

from __future__ import annotations


def data_rank(rank: int, ranks: int, context: int) -> tuple[int, int]:
    """A rank's number among those that clips are dealt out to, and how many these are.

    Args:
        rank: of all.
        ranks: all of them.
        context: neighbours that share each clip.
    """
    return rank // context, max(1, ranks // context)
