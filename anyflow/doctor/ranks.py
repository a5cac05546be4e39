"""What several GPUs send each other: NCCL's all-reduce among all of this machine's, in ranks of torchrun.

``python -m anyflow.doctor.ranks FILE BACKEND MIB`` is one of those ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from anyflow.doctor.findings import Findings
from anyflow.doctor.here import Here
from anyflow.system.files import write_atomically

SIZES_MIB = (1, 64, 512)
REPEATS = 5
SECONDS = 90.0
"""How long the ranks may take to meet and to send."""

SLOW_GB = 10.0
"""Gigabytes a second between GPUs that a plain bus reaches; less, and something stands in the way."""


def examine(found: Findings, here: Here, folder: Path) -> None:
    """Send among all GPUs."""
    count = torch.cuda.device_count()
    figures = send(folder, count, "nccl", SIZES_MIB)
    if figures is None:
        found.is_wrong(
            f"{count} GPUs did not send to each other within {SECONDS:.0f} s: see NCCL_DEBUG=INFO, and try "
            "NCCL_P2P_DISABLE=1"
        )
        return
    found.note({"gpus": count, **figures})
    if not figures["sums"]:
        found.is_wrong("the sums over the GPUs are wrong: update NCCL (it comes with torch) and the driver")
    best = max(figures[f"{size}_mib.gb_a_second"] for size in SIZES_MIB)
    if best < SLOW_GB:
        found.advise(f"the GPUs send each other {best:.1f} GB/s: see nvidia-smi topo -m; fsdp will wait for it")


def send(folder: Path, count: int, backend: str, sizes: tuple[int, ...]) -> dict[str, Any] | None:
    """All-reduce among ``count`` ranks; None if they do not come to an end in time."""
    place = folder / "ranks.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    words = ["-m", "anyflow.doctor.ranks", str(place), backend, ",".join(map(str, sizes))]
    try:
        done = subprocess.run([*launcher, *words], timeout=SECONDS, stdout=sys.stderr)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(place.read_text(encoding="utf-8")) if done.returncode == 0 and place.exists() else None


def be_a_rank(place: Path, backend: str, sizes: tuple[int, ...]) -> None:
    """Meet the others, send what is asked for, and let rank 0 write the figures."""
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    figures: dict[str, Any] = {"sums": True}
    for size in sizes:
        values = torch.full((size * 2**19,), float(rank + 1), dtype=torch.bfloat16, device=device)  # 2 bytes each
        dist.all_reduce(values)
        figures["sums"] = figures["sums"] and bool((values == ranks * (ranks + 1) / 2).all())
        seconds = median(_timed(values, device) for _ in range(REPEATS))
        sent = 2 * (ranks - 1) / ranks * values.nbytes  # what each must send and receive, however it is done
        figures |= {f"{size}_mib.ms": 1000 * seconds, f"{size}_mib.gb_a_second": sent / seconds / 1e9}
    if rank == 0:
        write_atomically(place, json.dumps(figures))
    dist.destroy_process_group()


def _timed(values: torch.Tensor, device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    dist.barrier()
    began = now()
    dist.all_reduce(values)
    return now() - began


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), sys.argv[2], tuple(int(size) for size in sys.argv[3].split(",")))
