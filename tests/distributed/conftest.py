"""What the tests of several ranks share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def models(small_model: Path, small_causal_model: Path) -> dict[str, Path]:
    """Folders of a small model of either architecture."""
    return {"bidirectional": small_model, "causal": small_causal_model}
