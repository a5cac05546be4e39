"""A SIGTERM while the libraries are still being imported: the door's first import, before anything that takes time.

A training that is stopped then has lost nothing. It says so by the exit code that a scheduler starts it again for; left
to itself the process would end with 143, which a scheduler takes for the end.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from anyflow.errors import EXIT_PREEMPTED

RESUMABLE = ("train", "experiment", "evaluate")
"""Commands that go on where they were stopped."""


def _leave(number: int, frame: Any) -> None:
    told = b"\nanyflow: stopped by SIGTERM before it began; run the same command again (train: with --resume auto)\n"
    if os.environ.get("RANK", "0") == "0":
        os.write(2, told)
    os._exit(EXIT_PREEMPTED)  # not sys.exit: an import in progress would report an error


if sys.argv[1:2] and sys.argv[1] in RESUMABLE and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
    signal.signal(signal.SIGTERM, _leave)
