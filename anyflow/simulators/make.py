"""Rendering a simulated data set: clips, shards and the card, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anyflow.data.card import CARD_NAME, DatasetCard, check_shards, write_card
from anyflow.data.clip import SPLITS, Clip
from anyflow.data.shards import CLIPS_PER_SHARD, write_shards
from anyflow.errors import UserError
from anyflow.simulators.simulated import FRAMES, HEIGHT, WIDTH, choose_look, package_versions, simulator
from anyflow.system.locks import claimed

Progress = Callable[[str, int, int], None]
"""Called after every clip with (split, clips done, clips in all)."""


def make_dataset(
    domain: str,
    clips: int,
    heldout: int,
    seed: int = 0,
    out: Path | None = None,
    workers: int = 2,
    progress: Progress | None = None,
    look: str | None = None,
) -> Path:
    """Render ``clips`` training and ``heldout`` held-out clips of a simulated domain.

    The folder is built beside its place and renamed at the end, so a broken run leaves nothing that looks finished.

    Args:
        out: the data set's folder; ``data/shards/DOMAIN`` by default, which is where the card ``DOMAIN-full`` looks.
        look: how the world is seen, one of the source's ``LOOKS``; the first by default.

    Returns:
        The new card's path, ``OUT/card.yaml``.

    Raises:
        UserError: an unknown domain, a number below 1, an unknown look, a folder in use, a missing simulator.
    """
    source = simulator(domain)
    for field, value in (("clips", clips), ("heldout", heldout), ("workers", workers)):
        if value < 1:
            raise UserError(f"{field} {value}: give at least 1")
    if seed < 0:
        raise UserError(f"seed {seed}: give 0 or more")
    folder = Path("data/shards") / domain if out is None else out
    choose_look(domain, source.LOOKS, look)
    packages = package_versions(*source.PACKAGES)  # before hours of rendering, not after
    with _place_beside(folder) as building:
        for split, count in zip(SPLITS, (clips, heldout), strict=True):
            rendered = source.render(count, split, seed, workers, look)
            counted = _report(rendered, split, count, progress) if progress else rendered
            write_shards(counted, building / split, f"{domain}-{split}", CLIPS_PER_SHARD)
        arguments = f"{domain} --clips {clips} --heldout {heldout} --seed {seed}" + (f" --look {look}" if look else "")
        card = DatasetCard(
            name=folder.name,
            domain=domain,
            description=source.DESCRIPTION,
            splits={split: building / split for split in SPLITS},
            frames=FRAMES,
            height=HEIGHT,
            width=WIDTH,
            fps=source.FPS,
            licence=source.LICENCE,
            controls=source.CONTROLS,
            attributes=source.ATTRIBUTES,
            provenance={
                "command": f"anyflow data make {arguments}",
                "seed": seed,
                "packages": packages,
            },
        )
        write_card(card, building / CARD_NAME)
        problems = check_shards(card)
        if problems:
            raise UserError(f"--out {str(folder)!r}: what was written does not read back ({problems[0]}); try again")
        if folder.exists():
            folder.rmdir()  # empty, as checked
        building.rename(folder)
    return folder / CARD_NAME


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


def _report(clips: Iterable[Clip], split: str, total: int, progress: Progress) -> Iterator[Clip]:
    for done, clip in enumerate(clips, start=1):
        yield clip
        progress(split, done, total)
