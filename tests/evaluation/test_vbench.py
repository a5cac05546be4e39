"""VBench: its prompts, file names and scores, through a stand-in for the package that looks for files as it does."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from anyflow.cli.main import app
from anyflow.errors import UserError
from anyflow.evaluation.report import picture
from anyflow.evaluation.vbench import (
    I2V,
    I2V_QUALITY,
    QUALITY,
    SEMANTIC,
    dimensions_of,
    installed_prompts,
    read_prompts,
    read_scores,
    run_vbench,
    totals,
)
from anyflow.system.locks import locked

PROMPTS = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a dog.", "dimension": ["motion_smoothness", "dynamic_degree"]},
    {"prompt_en": "a dog.", "dimension": ["motion_smoothness"]},
]
IMAGES = [
    {"prompt_en": "a lake", "dimension": ["i2v_background"], "image_name": "a lake.jpg"},
    {"prompt_en": "a lake, camera pans left", "dimension": ["camera_motion"]},
]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(PROMPTS))
    return path


class FakeVBench:
    """Looks for videos as vbench 0.1.5 does, and scores a dimension by how many it found."""

    def __init__(self, device: str, full_info_dir: str, output_path: str) -> None:
        self.info, self.out = Path(full_info_dir), Path(output_path)
        self.out.mkdir(parents=True, exist_ok=True)

    def evaluate(self, videos_path: str, name: str, dimension_list: list[str], **options: Any) -> None:
        assert options in ({"mode": "vbench_standard"}, {"resolution": "16-9"})
        names = sorted(path.name for path in Path(videos_path).iterdir())
        ending, results = Path(names[0]).suffix, {}
        for dimension in dimension_list:
            found = [
                video
                for entry in json.loads(self.info.read_text())
                if dimension in entry["dimension"]
                for index in range(5)
                if (video := f"{entry['prompt_en']}-{index}{ending}") in names
            ]
            results[dimension] = [len(found) / 10, found]
        (self.out / f"{name}_eval_results.json").write_text(json.dumps(results))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("vbench", "VBench"), ("vbench2_beta_i2v", "VBenchI2V")):
        module = types.ModuleType(name)
        setattr(module, kind, FakeVBench)
        monkeypatch.setitem(sys.modules, name, module)


def call(*words: str) -> Any:
    done = CliRunner().invoke(app, ["vbench", *words, "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def frames_of(video: Path) -> Any:
    from anyflow.data.decode import ClipShape, decode_clip

    return decode_clip(video.read_bytes(), ClipShape(17, 64, 96)).astype(float)


def test_prompts_are_those_of_the_dimensions_each_once(info: Path) -> None:
    assert [asked.prompt for asked in read_prompts(info, ["motion_smoothness"])] == ["a dog."]
    assert len(read_prompts(info, dimensions_of(image=False))) == 2
    for dimensions, words in (["sharpness"], "sharpness"), (["color"], "no prompt of color"):
        with pytest.raises(UserError, match=words):
            read_prompts(info, dimensions)
    info.write_text(json.dumps([{"prompt_en": "../up", "dimension": ["color"]}]))
    with pytest.raises(UserError, match="can name no file"):
        read_prompts(info, ["color"])
    info.write_text("{}x")
    with pytest.raises(UserError, match="no prompt list of VBench"):
        read_prompts(info, ["color"])


def test_an_image_goes_with_its_own_prompt_and_with_its_cameras(tmp_path: Path) -> None:
    path = tmp_path / "i2v.json"
    path.write_text(json.dumps(IMAGES))
    found = read_prompts(path, ["i2v_background", "camera_motion"], image=True)
    assert [(asked.prompt, asked.image) for asked in found] == [
        ("a lake", "a lake.jpg"),
        ("a lake, camera pans left", "a lake.jpg"),
    ]


def test_totals_are_the_published_means() -> None:
    """All dimensions at the top of their range: 1; at the bottom: 0. The published weights are 4 to 1, and 1 to 1."""
    for image, first, second, weight in ((False, QUALITY, SEMANTIC, 0.8), (True, I2V_QUALITY, I2V, 0.5)):
        top, bottom = {name: r.high for name, r in first.items()}, {name: r.low for name, r in second.items()}
        found = totals({**top, **bottom}, image=image)
        assert found["quality"] == pytest.approx(1) and found["total"] == pytest.approx(weight)
    assert len(QUALITY) + len(SEMANTIC) == 16 and sum(r.weight for r in QUALITY.values()) == 6.5
    assert "temporal_flickering" not in I2V_QUALITY
    half = {**{name: r.high for name, r in QUALITY.items()}, "dynamic_degree": 0.0}
    assert totals(half) == {"quality": pytest.approx(6 / 6.5)}, "no total without the semantic dimensions"
    assert totals({"color": 1.0}) == {}


def test_without_the_package_it_is_said(info: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vbench", None)
    with pytest.raises(UserError, match="pip install vbench"):
        run_vbench(tmp_path, info, ["color"], tmp_path)
    monkeypatch.delitem(sys.modules, "vbench")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert installed_prompts() is None


def test_results_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "anyflow_eval_results.json"
    path.write_text(json.dumps({"color": [0.5, [{"video_path": "x"}]], "scene": 0.25}))
    assert read_scores(path) == {"color": 0.5, "scene": 0.25}
    path.write_text(json.dumps(["color"]))
    with pytest.raises(UserError, match="no results of vbench"):
        read_scores(path)


def test_videos_lie_where_vbench_looks_and_its_scores_come_back(
    small_model: Path, info: Path, package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "out", []
    write = picture.write_mp4
    monkeypatch.setattr(picture, "write_mp4", lambda p, frames, fps: written.append(frames) or write(p, frames, fps))
    words = ["--model", str(small_model), "--info", str(info), "--out", str(out), "--steps", "1,2", "--samples", "2"]
    told = call(*words, "--score", "--dimensions", "motion_smoothness,temporal_flickering")
    videos = out / "steps-01" / "videos"
    assert {path.name for path in videos.iterdir()} == {
        f"{prompt}-{index}.mp4" for prompt in ("a dog.", "In a still frame, a stop sign") for index in (0, 1)
    }
    assert (out / "prompts.txt").read_text().splitlines() == ["In a still frame, a stop sign", "a dog."]
    assert told["scores"]["1"] == {"motion_smoothness": 0.4, "temporal_flickering": 0.2}
    assert json.loads((out / "vbench.json").read_text())["scores"] == told["scores"]
    first, other = (frames_of(videos / f"a dog.-{index}.mp4") for index in (1, 0))
    assert np.abs(first - other).mean() > 10
    kept = (videos / "a dog.-0.mp4").stat().st_mtime_ns
    (videos / "a dog.-1.mp4").unlink()
    call(*words, "--dimensions", "motion_smoothness,temporal_flickering", "--batch-size", "1")
    # The pixels before the lossy coder, which turns one level in a thousand pixels into two levels in all of them.
    before, again = written[3], written[-1]
    assert (videos / "a dog.-1.mp4").is_file() and len(written) == 9
    assert np.abs(np.subtract(before, again, dtype=float)).mean() < 0.1, "the same noise, whatever lies beside it"
    assert (videos / "a dog.-0.mp4").stat().st_mtime_ns == kept


def test_a_second_command_of_one_folder_ends_at_once(small_model: Path, info: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    words = ["--model", str(small_model), "--info", str(info), "--out", str(tmp_path / "out")]
    with locked(tmp_path / "out/.lock"), pytest.raises(UserError, match="out is being filled by another process"):
        call(*words, "--dimensions", "motion_smoothness")
    assert not (tmp_path / "out/settings.json").exists()


def test_image_to_video_begins_with_the_suites_images(small_model: Path, package: None, tmp_path: Path) -> None:
    from PIL import Image

    info, images = tmp_path / "i2v.json", tmp_path / "crop" / "16-9"
    info.write_text(json.dumps(IMAGES))
    images.mkdir(parents=True)
    words = ["--model", str(small_model), "--info", str(info), "--images", str(images), "--out", str(tmp_path / "out")]
    words += ["--steps", "1", "--samples", "1", "--dimensions", "i2v_background,camera_motion"]
    with pytest.raises(UserError, match=r"lacks 'a lake\.jpg'"):
        call(*words)
    Image.fromarray(np.full((90, 160, 3), 200, dtype=np.uint8)).save(images / "a lake.jpg")
    assert call(*words, "--score")["scores"]["1"] == {"i2v_background": 0.1, "camera_motion": 0.1}
