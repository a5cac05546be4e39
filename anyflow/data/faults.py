"""What can be wrong with a piece of footage, as exceptions: below all that read it."""

from __future__ import annotations


class DecodeError(Exception):
    """A clip that cannot be used; the message is the reason, in words."""


class NotColourError(DecodeError):
    """Pictures that are sound, and yet no footage: a depth map. They are left out and named; no budget is charged."""
