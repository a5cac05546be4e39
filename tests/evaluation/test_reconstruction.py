"""Reconstruction: PSNR against its closed form, everywhere and where it moves."""

from __future__ import annotations

import math

import pytest
import torch
from scenes import lane_change
from torch import Tensor

from anyflow.evaluation.reconstruction import compare, measure_domains, moving_pixels


def _clip() -> Tensor:
    return torch.from_numpy(lane_change(18.0))[None]


class _Offset:
    """A codec that loses nothing but adds a number of grey levels."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.batches: list[int] = []

    def encode_video(self, video: Tensor) -> Tensor:
        self.batches.append(len(video))
        return video

    def decode(self, latents: Tensor) -> Tensor:
        return latents + self.levels


def test_an_error_of_five_levels_gives_its_psnr_in_each_domain() -> None:
    """20 log10(255 / 5) = 34.15 dB, wherever it is measured."""
    codec = _Offset(5)
    marks = measure_domains(codec, {"a": _clip().repeat(5, 1, 1, 1, 1), "b": _clip()}, batch_size=2)
    assert codec.batches == [2, 2, 1, 1]
    for name, count in (("a", 5), ("b", 1)):
        assert marks[name].psnr == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
        assert marks[name].psnr_moving == pytest.approx(marks[name].psnr, abs=1e-4)
        assert marks[name].clips == count
    assert 0 < marks["a"].moving_share < 0.2
    assert set(marks["a"].to_json()) == {"psnr", "psnr_moving", "moving_share", "clips"}


def test_only_what_moves_and_its_rim_counts_as_moving() -> None:
    clip = torch.zeros(1, 4, 20, 20, 3, dtype=torch.uint8)
    clip[:, 2:, 8:10, 8:10] = 200
    clip[:, :, :3] = torch.randint(0, 9, (1, 4, 3, 20, 3), dtype=torch.uint8)
    mask = moving_pixels(clip)
    expected = torch.zeros(1, 4, 20, 20, dtype=torch.bool)
    expected[:, 1:3, 7:11, 7:11] = True
    assert torch.equal(mask, expected)


def test_an_error_where_it_moves_weighs_more_there() -> None:
    real = _clip()
    decoded = torch.where(moving_pixels(real)[..., None], real + 20, real)
    marks = compare([(real, decoded)])
    assert marks.psnr_moving == pytest.approx(20 * math.log10(255 / 20), abs=1e-4)
    assert marks.psnr == pytest.approx(marks.psnr_moving - 10 * math.log10(marks.moving_share), abs=1e-4)


def test_a_still_clip_has_no_moving_figure_and_no_clip_is_refused() -> None:
    still = torch.full((1, 5, 16, 16, 3), 90, dtype=torch.uint8)
    assert math.isnan(compare([(still, still + 1)]).psnr_moving)
    with pytest.raises(ValueError, match="no clips"):
        compare([])
    with pytest.raises(ValueError, match="do not match"):
        compare([(still, still[:, :4])])
