"""Does it hold? Two hundred chunks in a row under changing keys: motion, sharpness, and obedience, by chunk.

    python -m experiments.endless --model data/models/tiny-world --chunks 200 --steps 1,4 --out experiments/endless

The keys of a chunk are drawn: a side or none, and faster, slower or neither. A model of several domains is played in
each. What is asked sideways is the integral of the controls over a chunk (metres across the road; degrees turned), what
is made is read from the pixels of the same frames (:mod:`anyflow.simulators.motion`). Their correlation over a block of
chunks is obedience: 1 follows, 0 ignores. A chunk in which nothing can be followed counts as not read. Real held-out
clips say what motion and sharpness should be. Writes ``endless.json`` and ``endless.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anyflow.evaluation.distance import motion_energy
from anyflow.evaluation.loaded import LoadedModel
from anyflow.evaluation.options import WayOptions
from anyflow.play.hands import Hands, Wheel
from anyflow.play.options import PlayOptions
from anyflow.play.rollout import Rollout
from anyflow.play.serve import playable, player_of
from anyflow.play.starts import Start
from anyflow.simulators.motion import read_motion
from anyflow.system.files import write_atomically

BLOCK = 25
"""Chunks of one point of the plot."""

Clip = NDArray[np.uint8]


def asked_sideways(domain: str, names: Sequence[str], rows: NDArray[np.float32]) -> float:
    """What controls ``[n, W]`` ask for across the way over their frames: down on a road, to the right in a hall."""
    values = {
        name.rpartition(".")[2]: rows[:, place]
        for place, name in enumerate(names)
        if not np.isnan(rows[:, place]).any()
    }
    if domain == "driving":
        return float((values["speed"] * np.sin(values["heading"])).sum())
    return float(values["turn_right"].sum())


def made_sideways(domain: str, clip: Clip) -> float | None:
    """The same read from pixels ``[F, H, W, 3]``; None: nothing can be followed."""
    reading = read_motion(clip, domain)
    if reading is None or reading.label is None:
        return None
    seen = reading.path[np.isfinite(reading.path).all(1)]
    moved = seen[-1] - seen[0]
    return float(moved[1] if domain == "driving" else moved[0])


def sharpness(clip: Clip) -> float:
    """Mean change between neighbouring pixels, in grey levels."""
    grey = clip.astype(np.float32).mean(-1)
    return float(np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean())


def drawn_hands(wheel: Wheel, generator: np.random.Generator) -> Hands:
    """Keys of one chunk: each lever is pushed up, down, or left alone."""
    keys: dict[str, float] = {}
    for lever in wheel.levers:
        side = ((), lever.more, lever.less)[generator.choice(3, p=[0.4, 0.3, 0.3])]
        keys |= dict.fromkeys(side[:1], np.inf)
    return Hands(keys)


def play_long(
    model: LoadedModel, wheel: Wheel, start: Start, chunks: int, steps: int, seed: int
) -> list[dict[str, Any]]:
    """One row a chunk."""
    generator = np.random.default_rng(seed)
    rollout = Rollout(model, start.caption, None if start.pixels is None else torch.from_numpy(start.pixels), seed)
    wheel.begin(start.domain)
    names = [lever.label for lever in wheel.levers]
    found, before = [], None
    for number in range(chunks):
        rows = wheel.move(drawn_hands(wheel, generator), rollout.next_frames)
        clip = rollout.chunk(torch.from_numpy(rows), steps).numpy()
        if before is not None:
            whole = np.concatenate([before[-1:], clip])
            found.append(
                {
                    "chunk": number,
                    "motion": motion_energy(torch.from_numpy(whole[None])),
                    "sharpness": sharpness(clip),
                    "asked": asked_sideways(start.domain, names, rows),
                    "made": made_sideways(start.domain, whole),
                }
            )
        before = clip
    return found


def by_block(rows: Sequence[dict[str, Any]]) -> list[dict[str, float | None]]:
    """Means of ``BLOCK`` chunks, the share that was read, and the correlation of asked and made over what was."""
    blocks = []
    for begin in range(0, len(rows), BLOCK):
        part = rows[begin : begin + BLOCK]
        read = [(row["asked"], row["made"]) for row in part if row["made"] is not None]
        asked, made = np.array(read).T if len(read) > 2 else (np.zeros(0), np.zeros(0))
        varied = len(asked) > 2 and asked.std() > 0 and made.std() > 0
        blocks.append(
            {
                "chunk": part[0]["chunk"],
                "motion": float(np.mean([row["motion"] for row in part])),
                "sharpness": float(np.mean([row["sharpness"] for row in part])),
                "read": len(read) / len(part),
                "obedience": float(np.corrcoef(asked, made)[0, 1]) if varied else None,
            }
        )
    return blocks


def plot(found: dict[str, Any], path: Path) -> None:
    """A row for each domain, a column for each figure, a line for each number of steps."""
    from matplotlib.figure import Figure

    figures = ("motion", "sharpness", "obedience", "read")
    page = Figure(figsize=(14, 2.8 * len(found["domains"])), layout="constrained")
    axes = page.subplots(len(found["domains"]), len(figures), squeeze=False)
    for line, (domain, facts) in zip(axes, found["domains"].items(), strict=True):
        for axis, figure in zip(line, figures, strict=True):
            for steps, blocks in facts["steps"].items():
                values = [np.nan if block[figure] is None else block[figure] for block in blocks]
                axis.plot(
                    [block["chunk"] for block in blocks],
                    values,
                    marker="o",
                    label=f"{steps} step{'s' * (steps != '1')}",
                )
            if figure in facts["real"]:
                axis.axhline(facts["real"][figure], color="grey", linestyle="--", label="real clips")
            axis.set(
                title=f"{domain}: {figure}", xlabel="chunk", ylim=(0, None) if figure != "obedience" else (-1, 1.05)
            )
            axis.legend(fontsize=7)
    page.savefig(path, dpi=90)


def main() -> None:
    """Play, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/models/tiny-world")
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--steps", default="1,4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiments/endless"))
    given = parser.parse_args()
    found: dict[str, Any] = {"model": given.model, "chunks": given.chunks, "block": BLOCK, "domains": {}}
    ready = playable(given.model)
    player, facts = player_of(ready, PlayOptions())
    model = LoadedModel.of(given.model, WayOptions(), ready.shape)
    wheel = Wheel(facts.levers, facts.fps)
    for domain in dict.fromkeys(start.domain for start in player.starts):
        starts = [start for start in player.starts if start.domain == domain]
        curves = {
            steps: by_block(play_long(model, wheel, starts[0], given.chunks, int(steps), given.seed))
            for steps in given.steps.split(",")
        }
        found["domains"][domain] = {"steps": curves, "real": real_figures(domain)}
        for steps, blocks in curves.items():
            for block in blocks:
                told = {name: value if value is None else round(value, 2) for name, value in block.items()}
                print(domain, f"{steps} steps", told, flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    write_atomically(given.out / "endless.json", json.dumps(found, indent=1) + "\n")
    plot(found, given.out / "endless.png")
    print(given.out / "endless.png")


def real_figures(domain: str) -> dict[str, float]:
    """Motion and sharpness of held-out clips of a domain."""
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation.heldout import held_out

    clips = [
        np.asarray(item.frames) for item in held_out([f"{domain}-uncaptioned"], "heldout", ClipShape(17, 64, 96), 16)
    ]
    return {
        "motion": float(np.mean([motion_energy(torch.from_numpy(clip[None])) for clip in clips])),
        "sharpness": float(np.mean([sharpness(clip) for clip in clips])),
    }


if __name__ == "__main__":
    main()
