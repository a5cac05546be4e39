"""The map of the games domain: two halls with plain walls and four coloured pillars, written as a Doom WAD.

ViZDoom's own scenarios have fine, noisy textures, which neither read at 96x64 nor pass a small codec. Here every wall
is a row of broad panels in one colour and every pillar has its own colour, so that a turn is seen at a glance.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np

HALF_ROOM = 512
PILLAR_PLACES = ((256, 256), (-256, 256), (-256, -256), (256, -256))
HALF_PILLAR = 40
PANEL = 256
TEXTURE_HEIGHT = 256
"""Taller than any wall, so that none repeats upwards."""

Colour = tuple[int, int, int]
PILLAR_COLOURS: dict[str, Colour] = {
    "green": (60, 150, 40),
    "yellow": (230, 210, 60),
    "white": (225, 225, 225),
    "black": (30, 30, 30),
}


@dataclass(frozen=True)
class Hall:
    """One hall: its name as captions have it, where it lies on the map, its colours, and its height in map units."""

    name: str
    centre: tuple[int, int]
    wall: Colour
    floor: Colour
    ceiling: Colour
    height: int = 168


Halls = tuple[Hall, ...]
LOOKS: dict[str, Halls] = {
    "high": (
        Hall("red", (0, 0), (165, 55, 40), (150, 125, 95), (70, 60, 55)),
        Hall("blue", (4096, 0), (143, 143, 255), (120, 120, 120), (55, 60, 75)),
    ),
    "low": (
        Hall("red", (0, 0), (165, 55, 40), (120, 120, 120), (55, 60, 75), 112),
        Hall("blue", (4096, 0), (143, 143, 255), (150, 125, 95), (70, 60, 55), 112),
    ),
}


def build_wad(halls: Halls) -> bytes:
    """The map as a PWAD: the same bytes each time. ZDoom builds the nodes itself when it loads the map."""
    textures = [(f"W_{hall.name.upper()}", _panels(hall.wall)) for hall in halls]
    textures += [(f"P_{name.upper()}", _panels(colour, contrast=0.0)) for name, colour in PILLAR_COLOURS.items()]
    for hall in halls:
        textures.append((f"F_{hall.name.upper()}", _checkers(hall.floor)))
        textures.append((f"C_{hall.name.upper()}", _checkers(hall.ceiling)))
    lumps = [("MAP01", b""), ("TEXTMAP", _textmap(halls).encode()), ("ENDMAP", b""), ("TX_START", b"")]
    lumps += [*textures, ("TX_END", b"")]
    body, directory = b"", b""
    for name, data in lumps:
        directory += struct.pack("<ii8s", 12 + len(body), len(data), name.encode())
        body += data
    return struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(body)) + body + directory


def _textmap(halls: Halls) -> str:
    """The map in the text format UDMF. A line's right side faces its sector, so outer walls run clockwise."""
    vertices: list[tuple[int, int]] = []
    lines: list[tuple[int, int, int]] = []
    sides: list[tuple[str, int]] = []

    def loop(corners: list[tuple[int, int]], texture: str, sector: int) -> None:
        first = len(vertices)
        vertices.extend(corners)
        for i in range(len(corners)):
            lines.append((first + i, first + (i + 1) % len(corners), len(sides)))
            sides.append((texture, sector))

    for sector, hall in enumerate(halls):
        x, y = hall.centre
        loop(_square(x, y, HALF_ROOM), f"W_{hall.name.upper()}", sector)
        for (dx, dy), colour in zip(PILLAR_PLACES, PILLAR_COLOURS, strict=True):
            loop(_square(x + dx, y + dy, HALF_PILLAR)[::-1], f"P_{colour.upper()}", sector)
    blocks = ['namespace = "zdoom";', "thing { x = 0.0; y = 0.0; angle = 0; type = 1;"]
    blocks[-1] += " skill1 = true; skill2 = true; skill3 = true; skill4 = true; skill5 = true; single = true; }"
    blocks += [f"vertex {{ x = {x}.0; y = {y}.0; }}" for x, y in vertices]
    blocks += [f"linedef {{ v1 = {a}; v2 = {b}; sidefront = {side}; blocking = true; }}" for a, b, side in lines]
    blocks += [f'sidedef {{ sector = {sector}; texturemiddle = "{texture}"; }}' for texture, sector in sides]
    for hall in halls:
        name = hall.name.upper()
        blocks.append(
            f'sector {{ heightfloor = 0; heightceiling = {hall.height}; lightlevel = 255; texturefloor = "F_{name}";'
            f' textureceiling = "C_{name}"; }}'
        )
    return "\n".join(blocks) + "\n"


def _square(x: int, y: int, half: int) -> list[tuple[int, int]]:
    """Corners, clockwise as seen on the map."""
    return [(x - half, y - half), (x - half, y + half), (x + half, y + half), (x + half, y - half)]


def _panels(colour: Colour, contrast: float = 0.22) -> bytes:
    """A PNG texture: two broad panels, one a little darker than the other."""
    image = np.full((TEXTURE_HEIGHT, 2 * PANEL, 3), colour, dtype=np.float64)
    image[:, PANEL:] *= 1 - contrast
    return _png(image)


def _checkers(colour: Colour, contrast: float = 0.1) -> bytes:
    """A PNG texture of 256x256: large, faint checkers."""
    image = np.full((256, 256, 3), colour, dtype=np.float64)
    image[:128, :128] *= 1 - contrast
    image[128:, 128:] *= 1 - contrast
    return _png(image)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.rint(image).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
