"""Memory of a decoding worker over many epochs: it must not grow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def memory_benchmark(card: str, folder: Path, epochs: int = 10, batch_size: int = 8) -> dict[str, Any]:
    """Read a card for some epochs by one worker and note its resident memory after every batch.

    Args:
        card: its training split is read, as it is.
        folder: gets ``worker-memory.png``.
        epochs: to read. The slope is that of all but the first, in which caches fill.
        batch_size: clips of a batch.

    Returns:
        {"mib": after each epoch, "slope_mib_per_epoch", "batches", "plot"}.

    Raises:
        UserError: the card cannot be read.
    """
    import numpy as np

    from anyflow.data.decode import ClipShape
    from anyflow.data.order import Order
    from anyflow.data.reader import ShardReader, find_split
    from anyflow.data.batches import ClipDataset
    from anyflow.data.stream import ClipStream

    split = find_split(card, "train")
    shape = ClipShape(split.frames or 17, split.height or 64, split.width or 96)
    reader = ShardReader([split.folder], [split.caption])
    plan = Order(reader.identities(), seed=0, global_batch=batch_size)
    stream = ClipStream(ClipDataset(reader, plan, shape), epochs * plan.batches_per_epoch)
    batches: Any = stream.loader(num_workers=1).__iter__()
    sizes = []
    for batch in batches:
        stream.advance(batch)
        sizes.append(_resident(_worker()) / 2**20)
    # The worker runs a few batches ahead, and has left when the last ones are read.
    known = np.array([size for size in sizes if size > 0])
    per_epoch = [float(part.mean()) for part in np.array_split(known, epochs)]
    settled = known[plan.batches_per_epoch :]
    slope = float(np.polyfit(np.arange(len(settled)) / plan.batches_per_epoch, settled, 1)[0])
    plot = folder / "worker-memory.png"
    _draw(known, plan.batches_per_epoch, slope, plot)
    return {"mib": per_epoch, "slope_mib_per_epoch": slope, "batches": len(known), "plot": plot}


def _worker() -> int:
    """The process of the loader's worker: the only child of ours; 0 if it is gone."""
    import multiprocessing

    children = [child.pid for child in multiprocessing.active_children() if child.pid]
    return children[0] if children else 0


def _resident(process: int) -> int:
    """Bytes in memory; 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _draw(sizes: Any, batches_per_epoch: int, slope: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot([n / batches_per_epoch for n in range(len(sizes))], sizes)
    axes.set(
        xlabel="epoch", ylabel="MiB resident", title=f"a decoding worker: {slope:+.2f} MiB an epoch after the first"
    )
    axes.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
