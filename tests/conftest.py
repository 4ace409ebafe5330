"""Shared by all tests: few threads, and numpy seeds that a failure can be repeated with."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded from the test's name."""
    return np.random.default_rng(list(request.node.name.encode()))
