"""VBench and VBench-I2V: the videos that the ``vbench`` package looks for, its prompts, and its scores.

The package reads its own list of prompts (``VBench_full_info.json``; ``vbench2_i2v_full_info.json`` for
image-to-video) and looks for ``PROMPT-0.mp4`` to ``PROMPT-4.mp4`` in a folder that holds videos alone (it takes the
first file's ending for all). Its answer is ``NAME_eval_results.json``: by dimension, a mean score and each video's.

A dimension's score is brought to its published range, and the totals are the published weighted means, so that they
compare with the leaderboard. They are given where all their dimensions were measured, and never made up of fewer.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.errors import UserError

SAMPLES = 5
"""Videos of each prompt."""

_CAMERA = ", camera "
"""What stands between an image's own prompt and the motion that is asked of the camera."""


@dataclass(frozen=True)
class Range:
    """The range that a dimension's score is brought from, and its weight among the others."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


_CONSISTENCY = {"subject_consistency": Range(0.1462), "background_consistency": Range(0.2615)}
_SMOOTHNESS = {"motion_smoothness": Range(0.706, 0.9975), "dynamic_degree": Range(weight=0.5)}
_PICTURE = {"aesthetic_quality": Range(), "imaging_quality": Range()}

QUALITY = {**_CONSISTENCY, "temporal_flickering": Range(0.6293), **_SMOOTHNESS, **_PICTURE}
SEMANTIC = {
    **{name: Range() for name in ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship")},
    "scene": Range(0.0, 0.8222),
    "appearance_style": Range(0.0009, 0.2855),
    "temporal_style": Range(0.0, 0.364),
    "overall_consistency": Range(0.0, 0.364),
}
I2V_QUALITY = {**_CONSISTENCY, **_SMOOTHNESS, **_PICTURE}
I2V = {"camera_motion": Range(weight=0.1), "i2v_subject": Range(0.1462), "i2v_background": Range(0.2615)}

TEXT_TOTALS = {"quality": (QUALITY, 4.0), "semantic": (SEMANTIC, 1.0)}
IMAGE_TOTALS = {"quality": (I2V_QUALITY, 1.0), "i2v": (I2V, 1.0)}
"""The two means of each benchmark, and their weights in its total."""


@dataclass(frozen=True)
class Asked:
    """A prompt of the benchmark; ``image`` is the file's name of image-to-video's first frame."""

    prompt: str
    dimensions: tuple[str, ...]
    image: str | None = None


def dimensions_of(*, image: bool) -> tuple[str, ...]:
    """All dimensions of VBench, or of VBench-I2V."""
    groups = IMAGE_TOTALS if image else TEXT_TOTALS
    return tuple(name for ranges, _ in groups.values() for name in ranges)


def read_prompts(info: Path, dimensions: Sequence[str], *, image: bool = False) -> list[Asked]:
    """The prompts that these dimensions need, each once, from the package's list.

    Raises:
        UserError: the file is missing or no such list, a dimension is unknown, or a prompt can name no file.
    """
    unknown = set(dimensions) - set(dimensions_of(image=image))
    if unknown or not dimensions:
        known = ", ".join(dimensions_of(image=image))
        raise UserError(f"--dimensions {', '.join(sorted(unknown)) or '(none)'}: give some of {known}")
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
        found = {
            entry["prompt_en"]: Asked(
                entry["prompt_en"], tuple(entry["dimension"]), _image_of(entry) if image else None
            )
            for entry in entries
            if set(entry["dimension"]) & set(dimensions)
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--info {info} is no prompt list of VBench ({error}): give its full_info.json") from error
    for prompt in found:
        if "/" in prompt or "\0" in prompt or len(video_name(prompt, 0).encode()) > 255:
            raise UserError(f"--info {info}: the prompt {prompt[:60]!r} can name no file: it is not VBench's own list")
    if not found:
        raise UserError(f"--info {info} has no prompt of {', '.join(dimensions)}: take the other benchmark's list")
    return list(found.values())


def _image_of(entry: Mapping[str, Any]) -> str:
    """An entry's image; those that ask for a camera's motion are of the prompt before it."""
    return str(entry.get("image_name") or f"{entry['prompt_en'].rpartition(_CAMERA)[0] or entry['prompt_en']}.jpg")


def video_name(prompt: str, index: int) -> str:
    """The file that the package looks for."""
    return f"{prompt}-{index}.mp4"


def installed_prompts() -> Path | None:
    """The prompt list inside the installed package, None if it is not installed. Nothing of it is imported."""
    found = importlib.util.find_spec("vbench")
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    return next((path for place in places if (path := place / "VBench_full_info.json").is_file()), None)


def run_vbench(
    videos: Path,
    info: Path,
    dimensions: Sequence[str],
    out: Path,
    *,
    resolution: str | None = None,
    device: str = "cuda",
) -> dict[str, float]:
    """Let the installed package score a folder of videos.

    Args:
        videos: the folder, of videos alone.
        info: the prompt list.
        dimensions: to score.
        out: where its own files go.
        resolution: of image-to-video's cropped images (``1-1``, ``8-5``, ``7-4``, ``16-9``); None: text-to-video.
        device: that its networks run on.

    Returns:
        Mean scores as the package gives them, by dimension.

    Raises:
        UserError: the package is not installed, or it failed.
    """
    try:
        if resolution is None:
            from vbench import VBench as Benchmark
        else:
            from vbench2_beta_i2v import VBenchI2V as Benchmark
    except ImportError as error:
        raise UserError(
            f"vbench cannot be imported ({error}): pip install vbench, or score the videos elsewhere"
        ) from error
    options: dict[str, Any] = {"mode": "vbench_standard"} if resolution is None else {"resolution": resolution}
    try:
        Benchmark(device, str(info), str(out)).evaluate(
            videos_path=str(videos), name="anyflow", dimension_list=list(dimensions), **options
        )
    except Exception as error:  # whatever it is, the videos are there: it can be run again by hand
        raise UserError(f"vbench failed on {videos} ({type(error).__name__}: {error}); the videos are kept") from error
    return read_scores(out / "anyflow_eval_results.json")


def read_scores(path: Path) -> dict[str, float]:
    """The mean scores of a results file of the package, by dimension.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(result[0] if isinstance(result, list) else result) for name, result in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} holds no results of vbench ({error})") from error


def totals(scores: Mapping[str, float], *, image: bool = False) -> dict[str, float]:
    """The benchmark's own means of scores, 0..1: ``quality``, ``semantic`` (or ``i2v``) and ``total``.

    Those whose dimensions are not all there are left out.
    """
    groups, found = IMAGE_TOTALS if image else TEXT_TOTALS, {}
    for name, (ranges, _) in groups.items():
        if scores.keys() >= ranges.keys():
            brought = {key: (scores[key] - r.low) / (r.high - r.low) * r.weight for key, r in ranges.items()}
            found[name] = sum(brought.values()) / sum(r.weight for r in ranges.values())
    if len(found) == len(groups):
        weights = {name: weight for name, (_, weight) in groups.items()}
        found["total"] = sum(found[name] * weight for name, weight in weights.items()) / sum(weights.values())
    return found
