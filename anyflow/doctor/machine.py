"""What the machine is: versions, devices, memory, disk; and what of it cannot work."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from anyflow import __version__
from anyflow.doctor.findings import Findings
from anyflow.doctor.here import GIB, Here

PACKAGES = ("lightning", "diffusers", "peft", "transformers", "triton", "mlflow")

SHARED_MEMORY_GIB = 0.5
"""Less of /dev/shm, and decoding workers are killed (containers have 64 MB by default)."""

DISK_GIB = 20
"""Less, and a 1.3B run's checkpoints (4 GiB each, two kept, one under way) may not fit beside its model."""


def examine(found: Findings, here: Here, folder: Path) -> None:
    """Note the machine."""
    found.note({"device": _device_name(here), "anyflow": __version__, "python": platform.python_version()})
    found.note({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()})
    found.note({name: _version(name) for name in PACKAGES})
    found.note({"system": f"{platform.system()} {platform.release()}", **_processor(), **memory(), **_disk()})
    seen = driver()
    found.note({"driver": seen})
    if here.is_gpu:
        _gpu(found)
    elif seen is not None:
        found.is_wrong(
            f"nvidia-smi sees a GPU (driver {seen}) and torch {torch.__version__} does not: install a CUDA build of "
            "torch that this driver supports (rm -r .venv, then make install), and see CUDA_VISIBLE_DEVICES"
        )
    if found.figures["load"] > found.figures["cores"]:
        found.advise(f"a load of {found.figures['load']} on {found.figures['cores']} cores: times are a busy machine's")
    shared = found.figures["shared_memory_gib"]
    if shared is not None and shared < SHARED_MEMORY_GIB:
        found.advise(f"/dev/shm has {shared} GiB: start the container with --shm-size=8g, or workers may be killed")
    if found.figures["runs_disk_free_gib"] < DISK_GIB:
        found.advise(f"the disk of runs has {found.figures['runs_disk_free_gib']} GiB free: write elsewhere by run.out")


def _gpu(found: Findings) -> None:
    facts = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    capability = f"{facts.major}.{facts.minor}"
    found.note({"capability": capability, "gpu_memory_gib": total / GIB, "gpu_memory_free_gib": free / GIB})
    found.note({"multiprocessors": facts.multi_processor_count})
    if facts.major < 8:
        found.is_wrong(
            f"{facts.name} (capability {capability}) does not compute in bfloat16: take hardware.precision=32-true "
            "and the tiny models, or a GPU of capability 8.0 or more"
        )
    if free < 0.9 * total:
        found.advise(
            f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB of the GPU are taken by others: figures of memory "
            "and time will suffer"
        )


def _device_name(here: Here) -> str:
    return torch.cuda.get_device_name(0) if here.is_gpu else f"CPU, {_model_of_cpu()}"


def _model_of_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _processor() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": _model_of_cpu(), "cores": cores, "threads": torch.get_num_threads()}
    return {**facts, "load": round(os.getloadavg()[0], 1), "compiler": shutil.which("c++") or shutil.which("g++")}


def memory() -> dict[str, Any]:
    """Of the machine, what the system would give up of its caches counted as free; and the limit of this group."""
    size = {"MemTotal": 0.0, "MemAvailable": 0.0}
    if sys.platform.startswith("linux"):
        with open("/proc/meminfo", encoding="utf-8") as lines:
            told = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        size = {name: told[name] * 1024 / GIB for name in size}
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) / GIB
    except (OSError, ValueError):
        limit = None
    total, free = size.values()
    return {"memory_gib": total, "memory_free_gib": free, "memory_limit_gib": limit}


def _disk() -> dict[str, Any]:
    runs = next(place for place in (Path("runs").absolute(), *Path("runs").absolute().parents) if place.exists())
    shared = Path("/dev/shm")
    return {
        "runs_disk_free_gib": shutil.disk_usage(runs).free / GIB,
        "shared_memory_gib": shutil.disk_usage(shared).free / GIB if shared.exists() else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver from nvidia-smi; None if it sees no GPU."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    versions = done.stdout.split()
    return versions[0] if done.returncode == 0 and versions else None
