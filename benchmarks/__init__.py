"""Measurements; run as `python -m benchmarks.NAME` in the repository's root."""

import sys
from pathlib import Path

# `-m` puts this checkout first, whose pidiff/ lacks what an installation adds to it: an installed one goes before it.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent.parent:
    sys.path.append(sys.path.pop(0))
