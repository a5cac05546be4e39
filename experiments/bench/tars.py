"""Somebody else's tars: our two ways of reading them beside WebDataset's bare pipeline and bare decoding."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from anyflow.data import remote
from anyflow.data.decode import ClipShape, decode_clip
from anyflow.data.module import VideoDataModule
from anyflow.data.reader import ShardReader, split_folders
from anyflow.errors import UserError

SHAPE = ClipShape(17, 64, 96)
BATCH, BUFFER, TARS, WARM_UP = 8, 100, 8, 3
BUCKET = "bench"
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}


def tars_benchmark(card: str | Path = "driving", *, clips: int = 256, rounds: int = 3) -> dict[str, Any]:
    """Time the ways on the same clips: from this disk batch by batch in turn, from an S3 server pass by pass.

    All decode with the same function, in this process. From the disk each way is judged by its median batch, in time
    and in CPU seconds, which say the same on a busy machine. From the server, a process of its own on this machine, a
    pass reads every clip once; the index is there, its cache of tars is empty; WebDataset reads by its own ``curl``.

    Args:
        card: whose training clips are written into tars of mp4 and txt.
        clips: clips in the tars.
        rounds: passes of each way from the server.

    Returns:
        {"disk": {way: {"clips_per_second", "cpu_clips_per_second"}}, "s3": {way: {"clips_per_second"}}, "load"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get(remote.CACHE_VARIABLE)
        os.environ[remote.CACHE_VARIABLE] = f"{folder}/cache"
        try:
            files = write_tars(card, Path(folder) / "set", clips)
            pattern = f"{folder}/set/{{000000..{TARS - 1:06d}}}.tar"
            disk = _from_disk(card_of(Path(folder), pattern), pattern, files)
            return {
                "disk": disk,
                "s3": _from_server(Path(folder), clips, rounds),
                "load": os.getloadavg()[0],
                "clips": clips,
            }
        finally:
            os.environ.pop(remote.CACHE_VARIABLE)
            os.environ.update({} if before is None else {remote.CACHE_VARIABLE: before})


def write_tars(card: str | Path, folder: Path, clips: int) -> list[bytes]:
    """Write a card's first clips into tars, by the library's own writer; returns the videos."""
    import webdataset

    reader = ShardReader(split_folders(card, "train"))
    samples = [(number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples][:clips]
    if len(samples) < clips:
        raise UserError(f"card {card} has {len(samples)} clips and {clips} are to be measured: name another card")
    folder.mkdir(parents=True)
    videos = []
    for tar in range(TARS):
        with webdataset.TarWriter(str(folder / f"{tar:06d}.tar")) as writer:
            for number, sample in samples[tar::TARS]:
                videos.append(reader.read(number, sample, "mp4"))
                caption = reader.describe(number, sample)["caption"]
                writer.write({"__key__": sample.key, "mp4": videos[-1], "txt": caption})
    return videos


def card_of(folder: Path, tars: str) -> str:
    """A card that trains on all of them."""
    lines = ["name: bench", "domain: driving", "description: Tars.", "licence: as the clips'"]
    (folder / "bench.yaml").write_text("\n".join([*lines, f'splits: {{train: "{tars}"}}']))
    return str(folder / "bench.yaml")


def our_batches(card: str, streaming: bool, steps: int = 10**6) -> Iterator[Any]:
    """Our loader's batches."""
    data = VideoDataModule(
        card, batch_size=BATCH, frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width, steps=steps,
        streaming=streaming, shuffle_buffer=BUFFER,
    )  # fmt: skip
    return iter(data.train_dataloader())


def bare_batches(urls: str) -> Iterator[Any]:
    """The library's pipeline with the same decoder, without end."""
    import webdataset
    from webdataset import filters

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        return {
            "frames": decode_clip(sample["mp4"], SHAPE),
            "caption": sample["txt"].decode(),
            "key": sample["__key__"],
        }

    def batch(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"frames": np.stack([s["frames"] for s in samples]), "caption": [s["caption"] for s in samples]}

    while True:
        yield from webdataset.DataPipeline(
            webdataset.SimpleShardList(urls),
            webdataset.tarfile_to_samples(),
            filters.shuffle(BUFFER, initial=BUFFER // 10),
            filters.map(decode),
            filters.batched(BATCH, collation_fn=batch, partial=False),
        )


def decoding_batches(videos: list[bytes]) -> Iterator[Any]:
    """Nothing but the decoder, on bytes that are in memory."""
    while True:
        for start in range(0, len(videos) - BATCH + 1, BATCH):
            frames = np.empty((BATCH, SHAPE.frames, SHAPE.height, SHAPE.width, 3), dtype=np.uint8)
            yield [decode_clip(video, SHAPE, out=row) for video, row in zip(videos[start:], frames, strict=False)]


def _from_disk(card: str, urls: str, videos: list[bytes]) -> dict[str, dict[str, float]]:
    ways = {
        "indexed": our_batches(card, streaming=False),
        "streamed": our_batches(card, streaming=True),
        "webdataset": bare_batches(urls),
        "decoding": decoding_batches(videos),
    }
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(WARM_UP + 2 * len(videos) // BATCH):
        for name in random.Random(step).sample(sorted(ways), len(ways)):
            began, began_cpu = time.perf_counter(), time.process_time()
            next(ways[name])
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    return {
        name: {
            "clips_per_second": BATCH / median(wall[name][WARM_UP:]),
            "cpu_clips_per_second": BATCH / median(cpu[name][WARM_UP:]),
        }
        for name in ways
    }


def _from_server(folder: Path, clips: int, rounds: int) -> dict[str, dict[str, float]]:
    """Each way's passes over the tars in a bucket; nothing where no server is installed."""
    from importlib.util import find_spec

    if not (find_spec("moto") and find_spec("s3fs")):
        return {}
    with serve_bucket(folder / "set") as address:
        card = card_of(folder, f"s3://{BUCKET}/{{000000..{TARS - 1:06d}}}.tar")
        urls = f"{address}/{BUCKET}/{{000000..{TARS - 1:06d}}}.tar"
        steps = clips // BATCH
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "indexed": lambda: our_batches(card, streaming=False),
            "streamed": lambda: our_batches(card, streaming=True),
            "webdataset": lambda: bare_batches(urls),
        }
        ways["indexed"]()  # the index is made once, beforehand
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in random.Random(number).sample(sorted(ways), len(ways)):
                for copied in Path(os.environ[remote.CACHE_VARIABLE]).glob("*/*.tar"):
                    copied.unlink()
                batches = ways[name]()
                began = time.perf_counter()
                for _ in range(steps):
                    next(batches)
                seconds[name].append(time.perf_counter() - began)
    return {name: {"clips_per_second": steps * BATCH / median(values)} for name, values in seconds.items()}


@contextmanager
def serve_bucket(folder: Path) -> Iterator[str]:
    """A real S3 server on this machine with a folder's files in a bucket, and the credentials for it."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    kept = {name: os.environ.get(name) for name in (*KEYS, "AWS_ENDPOINT_URL")}
    os.environ.update({**KEYS, "AWS_ENDPOINT_URL": address})
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **silent)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise UserError("the S3 server of the figure did not start: pip install -e '.[dev]'") from None
                time.sleep(0.2)
        files = fsspec.filesystem("s3")
        files.mkdir(BUCKET)
        for path in sorted(folder.iterdir()):
            files.put(str(path), f"{BUCKET}/{path.name}")
            files.chmod(f"{BUCKET}/{path.name}", "public-read")  # curl has no credentials
        yield address
    finally:
        server.terminate()
        server.wait()
        for name, value in kept.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
