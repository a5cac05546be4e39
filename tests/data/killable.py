"""A run that may be killed at any moment: the stream alone, on one or two ranks in one process, with its checkpoints.

``python killable.py '{"cards": [...], "world_size": 2, "num_workers": 1, "steps": 60, "checkpoint": "..."}'``

A checkpoint holds the keys of all clips that were trained on, as weights would. Every batch is told on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from anyflow.data.module import VideoDataModule

GLOBAL_BATCH, EVERY = 4, 3


def rank_of(run: dict[str, Any], rank: int) -> VideoDataModule:
    data = VideoDataModule(
        run["cards"],
        batch_size=GLOBAL_BATCH // run["world_size"],
        frames=5,
        height=32,
        width=48,
        steps=run["steps"],
        num_workers=run["num_workers"],
        weights=run.get("weights", ()),
        buckets=[tuple(shape) for shape in run.get("buckets", ())],
        streaming=run.get("streaming", False),
        shuffle_buffer=7,
    )
    trainer = SimpleNamespace(global_rank=rank, world_size=run["world_size"], callbacks=[])
    data.trainer = trainer  # type: ignore[assignment]
    data.setup()
    data.trainer = None
    return data


def state_of(ranks: list[VideoDataModule]) -> dict[str, Any]:
    """What the first rank saves once all have told each other theirs."""
    states = [data.state_dict() for data in ranks]
    lanes = {lane: text for state in states for lane, text in state.get("lanes", {}).items()}
    return {**states[0], "lanes": lanes} if lanes else states[0]


def main(run: dict[str, Any]) -> None:
    ranks = [rank_of(run, rank) for rank in range(run["world_size"])]
    checkpoint, seen = Path(run["checkpoint"]), []
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
        seen = saved["seen"]
        for data in ranks:
            data.load_state_dict(saved["state"])
    for batches in zip(*(data.train_dataloader() for data in ranks), strict=True):
        for data, batch in zip(ranks, batches, strict=True):
            assert data.stream is not None
            data.stream.advance(batch)
        seen += [key for dealt in zip(*(batch["key"] for batch in batches), strict=True) for key in dealt]
        step = batches[0]["position"] + 1
        if step % EVERY == 0 or step == run["steps"]:
            beside = checkpoint.with_suffix(".part")
            beside.write_text(json.dumps({"seen": seen, "state": state_of(ranks)}))
            os.replace(beside, checkpoint)
        print(step, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
