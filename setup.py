"""What an installed copy needs beside the package: recipes, cards, starter clips, embedded models and experiments.

They go to ``share/anyflow`` of the environment (``anyflow/system/places.py`` looks there). An editable install has them
in the project's folder. All else is in pyproject.toml.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

YAML = ("data", "experiments", *map(str, sorted(Path("recipes").iterdir())))
WHOLE = ("data/models", "data/starter")


def shipped() -> list[tuple[str, list[str]]]:
    """(folder in the environment, files of the project), folder by folder; linked folders are copied."""
    folders = {place: [str(path) for path in sorted(Path(place).glob("*.yaml"))] for place in YAML}
    for place in WHOLE:
        for folder, _, names in os.walk(place, followlinks=True):
            folders[folder] = [os.path.join(folder, name) for name in sorted(names)]
    return [(f"share/anyflow/{folder}", files) for folder, files in sorted(folders.items()) if files]


setup(data_files=[] if "editable_wheel" in sys.argv else shipped())
