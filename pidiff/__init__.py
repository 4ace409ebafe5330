"""PIDiff: identity-personalised diffusion, from training to the edge.

No part of it is imported here, so that `pidiff.runtime` works without torch.
"""

import os

# From the moment of its import on, ONNX Runtime (1.32, on Linux) reports its use to a web service and keeps a number of this machine in the
# home folder, unless it finds this. What is in the environment already is the user's own wish.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
