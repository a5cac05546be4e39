"""Rendering a simulated data set: clips, shards and the card, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyflow.data.card import CARD_NAME, DatasetCard, check_shards, write_card
from anyflow.data.clip import SPLITS, Clip
from anyflow.data.control_ranges import measured_controls
from anyflow.data.shards import CLIPS_PER_SHARD, write_shards
from anyflow.errors import UserError
from anyflow.simulators.options import RenderOptions
from anyflow.simulators.simulated import FRAMES, HEIGHT, WIDTH, choose_look, package_versions, simulator
from anyflow.system.console import OnProgress
from anyflow.system.locks import claimed


def make_dataset(
    domain: str, options: RenderOptions, out: Path | None = None, on_progress: OnProgress | None = None
) -> Path:
    """Render the training and held-out clips of a simulated domain, all of them or none.

    Args:
        domain: whose.
        options: how many, from which seed, by which look.
        out: the data set's folder; ``data/shards/DOMAIN`` by default, which is where the card ``DOMAIN-full`` looks.
        on_progress: called after every clip with (clips done, clips in all, split).

    Returns:
        The new card's path, ``OUT/card.yaml``.

    Raises:
        UserError: an unknown domain or look, a folder in use, a missing simulator.
    """
    source = simulator(domain)
    folder = Path("data/shards") / domain if out is None else out
    choose_look(domain, source.LOOKS, options.look)
    packages = package_versions(*source.PACKAGES)  # before hours of rendering, not after
    with _place_beside(folder) as building:
        for split, count in zip(SPLITS, (options.clips, options.heldout), strict=True):
            rendered = source.render(count, split, options.seed, options.workers, options.look)
            counted = _counted(rendered, split, count, on_progress) if on_progress else rendered
            write_shards(counted, building / split, f"{domain}-{split}", CLIPS_PER_SHARD)
        provenance = {"command": options.command(domain), "seed": options.seed, "packages": packages}
        card = _card(folder.name, domain, source, options.look, building, provenance)
        write_card(replace(card, controls=measured_controls(card)[0]), building / CARD_NAME)
        problems = check_shards(card)
        if problems:
            raise UserError(f"--out {str(folder)!r}: what was written does not read back ({problems[0]}); try again")
        if folder.exists():
            folder.rmdir()  # empty, as checked
        building.rename(folder)
    return folder / CARD_NAME


def _card(
    name: str, domain: str, source: Any, look: str | None, folder: Path, provenance: dict[str, Any]
) -> DatasetCard:
    return DatasetCard(
        name=name,
        domain=domain,
        description=getattr(source, "DESCRIPTIONS", {}).get(look or "", source.DESCRIPTION),
        splits={split: folder / split for split in SPLITS},
        frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        fps=source.FPS,
        licence=source.LICENCE,
        controls=source.CONTROLS,
        attributes=source.ATTRIBUTES,
        provenance=provenance,
    )


@contextmanager
def _place_beside(folder: Path) -> Iterator[Path]:
    """A new folder to build in, which is removed afterwards; nobody else builds for the same place meanwhile.

    Raises:
        UserError: the place is in use, or another process builds for it.
    """
    home = folder.with_name(f".{folder.name}.part")
    try:
        with claimed(home):
            try:
                if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                    raise UserError(f"--out {str(folder)!r} is in use: give another folder, or remove it first")
                shutil.rmtree(home / "new", ignore_errors=True)  # of a killed process
                yield home / "new"
            finally:
                shutil.rmtree(home, ignore_errors=True)
    except BlockingIOError as error:
        raise UserError(f"another process renders {str(folder)!r}: wait for it, or give another --out") from error


def _counted(clips: Iterable[Clip], split: str, total: int, on_progress: OnProgress) -> Iterator[Clip]:
    for done, clip in enumerate(clips, start=1):
        yield clip
        on_progress(done, total, split)
