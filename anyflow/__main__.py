"""``python -m anyflow``: the same as ``anyflow``."""

from anyflow.cli.main import main

main()
