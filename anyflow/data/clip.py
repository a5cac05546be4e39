"""The one shape that footage has between a source and a shard: a short clip, its caption and its labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from typing import Any, Literal

import av
import numpy as np

from anyflow.data.picture import BT709, reformatter, untagged_matrix
from anyflow.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

SplitName = Literal["train", "heldout"]
SPLITS: tuple[SplitName, ...] = ("train", "heldout")

DEFAULT_CRF = 18
MAX_GOP = 17


@dataclass(frozen=True)
class Clip:
    """One clip of footage.

    Exactly one of ``frames`` and ``mp4`` is given: a source that renders gives frames, a shard gives bytes back.

    Attributes:
        key: unique within a data set; no dot, no slash (a shard's member is ``KEY.mp4``).
        caption: one or two sentences that say what is seen.
        fps: frames a second, as played and as simulated.
        domain: "driving", "robotics", "games", ...
        frames: uint8 [F, H, W, 3], or None.
        mp4: an H.264 file's bytes, or None.
        controls: "actions" (a list, one entry a frame) and "trajectory" (a list of coordinates, one entry a frame).
        attributes: short labels, measured from the simulator's state or taken from the source's metadata.
        licence: SPDX name, or a sentence.
    """

    key: str
    caption: str
    fps: float
    domain: str
    frames: Array | None = None
    mp4: bytes | None = None
    controls: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    licence: str = ""

    def __post_init__(self) -> None:
        if not self.key or any(character in self.key for character in "./\\"):
            raise UserError(f"clip key {self.key!r}: give a name without dots and slashes")
        if (self.frames is None) == (self.mp4 is None):
            raise UserError(f"clip {self.key!r}: give either frames or mp4 bytes, not both or neither")

    def encoded(self, crf: int = DEFAULT_CRF) -> Clip:
        """The same clip with its frames as mp4 bytes."""
        if self.frames is None:
            return self
        return Clip(
            key=self.key,
            caption=self.caption,
            fps=self.fps,
            domain=self.domain,
            mp4=encode_mp4(self.frames, self.fps, crf),
            controls=self.controls,
            attributes=self.attributes,
            licence=self.licence,
        )

    def parts(self) -> dict[str, bytes]:
        """The clip as a shard's members: {"mp4": ..., "json": ...}, the same bytes for the same clip."""
        video = self.encoded().mp4
        assert video is not None
        return {"mp4": video, "json": self.metadata_json()}

    def metadata_json(self) -> bytes:
        """All but the pixels, as JSON with sorted keys."""
        metadata = {
            "caption": self.caption,
            "fps": self.fps,
            "domain": self.domain,
            "controls": dict(self.controls),
            "attributes": dict(self.attributes),
            "licence": self.licence,
        }
        return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_parts(cls, key: str, parts: Mapping[str, bytes]) -> Clip:
        """The inverse of :meth:`parts`.

        Raises:
            UserError: a member is missing or is not the JSON that a shard has.
        """
        missing = sorted({"mp4", "json"} - set(parts))
        if missing:
            raise UserError(f"sample {key!r}: no {' and no '.join(missing)} member; write the shard again")
        try:
            metadata = json.loads(parts["json"])
            return cls(key=key, mp4=parts["mp4"], **metadata)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"sample {key!r}: its json member does not describe a clip ({error})") from error


def encode_mp4(frames: Array, fps: float, crf: int = DEFAULT_CRF, preset: str = "slow") -> bytes:
    """H.264 in mp4, yuv420p: one thread and no time stamps, hence the same bytes for the same frames.

    Args:
        frames: uint8 [F, H, W, 3], H and W even.
        fps: frames a second.
        crf: x264's constant rate factor; 0 is lossless, 18 is hard to tell from the source.
        preset: x264's effort.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise UserError(f"frames {frames.dtype} {list(frames.shape)}: give uint8 [F, H, W, 3]")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UserError(f"frame size {frames.shape[2]}x{frames.shape[1]}: yuv420p needs an even width and height")
    rate = Fraction(fps).limit_denominator(1000)
    # With x264's look-ahead "mbtree", equal small frames were seen to give different files now and then.
    options = {"crf": str(crf), "preset": preset, "g": str(MAX_GOP), "threads": "1", "x264-params": "mbtree=0"}
    file = BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1], frames.shape[2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        matrix = untagged_matrix(*frames.shape[1:3])
        if matrix == BT709:  # tagged as well, for most readers take what is not for BT.601
            stream.codec_context.colorspace = stream.codec_context.color_primaries = matrix
            stream.codec_context.color_trc = matrix
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            scaled = reformatter().reformat(
                frame, format="yuv420p", interpolation="AREA", threads=1, dst_colorspace=matrix
            )
            container.mux(stream.encode(scaled))
        container.mux(stream.encode())
    return file.getvalue()
