"""``python -m anyflow``: the same as ``anyflow``."""

from anyflow.cli import main

main()
