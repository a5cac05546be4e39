"""Every figure that is measured: what it is called, which way is better, how it is written. The one list of them."""

from __future__ import annotations

from dataclasses import dataclass

LOWER, HIGHER, AS_REAL = "lower", "higher", ""


@dataclass(frozen=True)
class Figure:
    """A figure of a set of clips.

    Attributes:
        name: the field of a curve's row.
        heading: what stands above a column or beside an axis.
        better: ``lower``, ``higher``, or empty: the nearer to real clips the better.
        digits: after the point.
        is_share: whether it is a share of the clips, written in percent.
        has_ratio: whether it is above 0 but by a miracle, so that one value is a multiple of another.
    """

    name: str
    heading: str
    better: str
    digits: int = 3
    is_share: bool = False
    has_ratio: bool = True

    @property
    def compares(self) -> bool:
        """Whether one value is so many times as bad as another."""
        return bool(self.better) and self.has_ratio

    def trials(self, clips: int, motion_clips: int | None) -> int:
        """Of how many clips it is a share: of those that ask for a motion, or of all."""
        return int((motion_clips if self.name.startswith("motion_") else None) or clips)


FIGURES = {
    figure.name: figure
    for figure in (
        Figure("motion_accuracy", "motion right", HIGHER, is_share=True),
        Figure("motion_unread", "motion not read", LOWER, is_share=True, has_ratio=False),
        Figure("whole_cars", "whole cars", HIGHER, is_share=True),
        Figure("whole_frames", "frames of whole cars", HIGHER, is_share=True),
        Figure("frame_frechet", "frame Frechet", LOWER),
        Figure("decoded_frechet", "Frechet to decoded clips", LOWER),
        Figure("sliced_w1", "sliced W1", LOWER, digits=4),
        Figure("motion_energy", "motion energy", AS_REAL, digits=2),
        Figure("spread", "spread", AS_REAL),
        Figure("frame_kernel", "frame kernel", LOWER, has_ratio=False),
        Figure("temporal_consistency", "temporal SSIM", AS_REAL),
        Figure("path_error", "path error, px", LOWER, digits=2),
        Figure("path_end_error", "path end error, px", LOWER, digits=2),
        Figure("path_right", "path right", HIGHER, is_share=True),
        Figure("swap_gap", "swap gap, px", HIGHER, digits=2, has_ratio=False),
        Figure("control_gap", "control gap, half ranges", HIGHER, digits=2, has_ratio=False),
        Figure("obedience", "obedience", HIGHER, digits=2),
        Figure("control_correlation", "control correlation", HIGHER, digits=2),
        Figure("key_states_right", "key states right", HIGHER, is_share=True),
        Figure("given_frame_psnr", "given frames, dB", HIGHER, digits=1),
        Figure("preview_error", "preview error", LOWER, has_ratio=False),
        Figure("sampling_seconds", "sampling, s", LOWER, digits=2),
        Figure("decoding_seconds", "decoding, s", LOWER, digits=2),
    )
}
"""By name. A preview has no error at the most steps, a kernel distance can be 0 or below: they have no ratio."""


def figure_of(name: str) -> Figure | None:
    """The figure of a name, those of further judges included (``probe_LABEL_right``, ``ENCODER_frechet``)."""
    if name in FIGURES:
        return FIGURES[name]
    heading = name.replace("_", " ")
    if name.endswith("_right"):
        return Figure(name, heading, HIGHER, is_share=True)
    if name.endswith("_frechet"):
        return Figure(name, heading, LOWER)
    return Figure(name, heading, LOWER, has_ratio=False) if name.endswith("_kernel") else None
