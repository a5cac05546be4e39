"""Errors that a user can mend, and the exit codes that a scheduler reads."""

from __future__ import annotations

EXIT_USER = 2
"""The recipe, the arguments or the files are at fault: one sentence says what and how to mend it."""

EXIT_INTERRUPTED = 130
"""Ctrl-C: saved like a preemption."""

EXIT_PREEMPTED = 75
"""The run was told to stop (SIGTERM), saved itself and can go on: start it again with ``--resume auto``."""


class UserError(Exception):
    """A mistake of the user's: one sentence that names the field, the value and the remedy."""
