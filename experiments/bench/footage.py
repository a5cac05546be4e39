"""An import's speed beside that of bare decoding, and of bare decoding and encoding, on the same footage."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from anyflow.data.importing.options import ImportOptions
    from anyflow.data.importing.recording import Footage, Recording


def import_benchmark(source: Path, options: ImportOptions) -> dict[str, Any]:
    """Import a folder in this process, and decode the same files by PyAV alone.

    Bare decoding reads every file once, on one thread, and scales each frame to the clips' size; the second limit also
    encodes as many clips as the import made. Both leave out what else an import does: the source's tables, times,
    scene cuts, duplicates, controls, shards.

    Args:
        source: a folder in any format that can be imported.
        options: of the import; it works in this process whatever they say, and ``size`` must be given.

    Returns:
        {"clips", "clips_per_second", "decoding_clips_per_second", "coding_clips_per_second", "ratio", "seconds"}: clips
        by seconds of CPU on one core, which say the same on a busy machine; the ratio is to the second limit; the
        import's seconds are the clock's.

    Raises:
        UserError: as the import.
    """
    from anyflow.data.importing.formats.known import detect_format, snapshot, source_of
    from anyflow.data.importing.recording import Recording
    from anyflow.data.importing.run import import_dataset

    assert options.size is not None
    folder = snapshot(source.absolute())
    module = source_of(options.format or detect_format(folder))
    recordings = [found for found in module.recordings(folder) if isinstance(found, Recording)]
    with tempfile.TemporaryDirectory(prefix="anyflow-bench-") as place:
        import_dataset(
            source, Path(place) / "first", replace(options, workers=0, limit=2, clips=1, heldout=0.0)
        )  # warms
        started = time.monotonic()
        out = Path(place) / "set"
        importing, report = _timed(lambda: import_dataset(source, out, replace(options, workers=0)))
        seconds = time.monotonic() - started
    clips = sum(report.clips.values())
    decoding, frames = _timed(lambda: _decode(recordings, options.size or (0, 0)))
    encoding, _ = _timed(lambda: _encode(frames, options.frames, clips))
    return {
        "clips": clips,
        "clips_per_second": clips / importing,
        "decoding_clips_per_second": clips / decoding,
        "coding_clips_per_second": clips / (decoding + encoding),
        "ratio": (decoding + encoding) / importing,
        "seconds": seconds,
    }


def usual_options() -> ImportOptions:
    """Clips of the embedded model's shape, from whatever has pictures."""
    from anyflow.data.importing.options import ImportOptions

    return ImportOptions(frames=17, size=(96, 64), default_caption="Footage.", error_budget=1.0, keep_duplicates=True)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU, and what came of it."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def _decode(recordings: Sequence[Recording], size: tuple[int, int]) -> list[np.ndarray]:
    """Every frame of every file; returns the first file's pictures, to be encoded."""
    from av.video.reformatter import VideoReformatter

    width, height = size
    kept: list[np.ndarray] = []
    reformat = VideoReformatter().reformat
    for number, frames in enumerate(map(_frames, dict.fromkeys(recording.footage for recording in recordings))):
        for frame in frames:
            picture = reformat(frame, width, height, format="rgb24", interpolation="AREA", threads=1).to_ndarray()
            if number == 0 and len(kept) < 64:
                kept.append(picture)
    return kept


def _frames(footage: Footage) -> Iterator[Any]:
    import io

    import av

    from anyflow.data.importing.footage import read_bytes
    from anyflow.data.importing.recording import ImageFiles, VideoFile

    paths = footage.paths if isinstance(footage, ImageFiles) else (None,)
    for path in paths:
        data = read_bytes(VideoFile(path) if path is not None else footage)
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            yield from container.decode(video=0)


def _encode(pictures: Sequence[np.ndarray], frames: int, clips: int) -> None:
    """So many clips of those pictures, over and over, as an import encodes them."""
    import numpy as np

    from anyflow.data.clip import encode_mp4
    from anyflow.data.importing.cutting import PRESET

    for number in range(clips):
        chosen = [pictures[(number + place) % len(pictures)] for place in range(frames)]
        encode_mp4(np.stack(chosen), 8.0, preset=PRESET)
