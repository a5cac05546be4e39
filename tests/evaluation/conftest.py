"""What the tests of measures share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from anyflow.evaluation import judge
from anyflow.evaluation.distance import sliced_wasserstein


@pytest.fixture(autouse=True, scope="module")
def few_directions() -> Iterator[None]:
    """Curves of drawn clips have latents as large as the pixels: all directions would take most of the time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judge, "sliced_wasserstein", partial(sliced_wasserstein, projections=16))
        yield
