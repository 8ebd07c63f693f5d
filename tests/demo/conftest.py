"""What tests of the demo's world share."""

from __future__ import annotations

import pytest
from handiffuser.demo import human_skin


@pytest.fixture(scope="module")
def coarse_skin():
    """Textures of a few texels, for tests that do not depend on their detail."""
    sizes = human_skin.HAND_SIZE, human_skin.HEAD_SIZE
    human_skin.textures.cache_clear()
    human_skin.HAND_SIZE, human_skin.HEAD_SIZE = 128, 64
    yield
    human_skin.HAND_SIZE, human_skin.HEAD_SIZE = sizes
    human_skin.textures.cache_clear()
