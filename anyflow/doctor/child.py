"""One item in a process of its own: ``python -m anyflow.doctor.child module:function folder``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path

from anyflow.doctor.findings import Findings
from anyflow.errors import UserError, first_line
from anyflow.system.ranks import end_with_watcher

FOUND = "findings.json"
"""Where a child leaves what it finds, in its folder."""


def run(work: str, folder: Path) -> int:
    """Examine, and keep what was found even if it fails; returns the exit code."""
    end_with_watcher()
    os.environ.pop("ANYFLOW_WATCHER", None)  # what this process starts has another parent
    found = Findings(folder / FOUND)
    found.note({})
    from anyflow.doctor.here import Here, is_out_of_memory

    try:
        module, _, function = work.partition(":")
        getattr(importlib.import_module(module), function)(found, Here.find(), folder)
    except UserError as error:
        found.is_wrong(str(error))
    except Exception as error:
        traceback.print_exc()
        first = first_line(error)
        if is_out_of_memory(error):
            found.is_wrong(f"memory ran out ({first}): end what else holds memory on this machine, and try again")
        else:
            found.is_wrong(f"failed: {type(error).__name__}: {first}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], Path(sys.argv[2])))
