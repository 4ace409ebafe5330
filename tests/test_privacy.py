"""ONNX Runtime reports its use to a web service from its import on, and keeps the reports, and a number of the machine, in the home folder.
OpenVINO's wheel brings a package that does the same. Nothing of that may happen by PIDiff."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODES = {     # every part of PIDiff is imported through the package
    "drawing": "from pidiff.runtime import Pipeline; Pipeline.from_bundle(sys.argv[1], engine='onnxruntime', threads=1).prepare('a photo')",
    "the package": "import pidiff",
    "drawing in OpenVINO": "from pidiff.runtime import Pipeline; Pipeline.from_bundle(sys.argv[1], engine='openvino', threads=1).prepare('a photo')\n"
                           "assert 'openvino' in sys.modules and not [m for m in sys.modules if 'telemetry' in m and sys.modules[m] is not None\n"
                           "                                          and not m.startswith('openvino.')]",
}


def home_after(code, folder, bundle, **environment):
    """Names of the files that a process of its own left in its home folder."""
    clean = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}\nimport onnxruntime, time; time.sleep(0.5)", str(bundle)], cwd=Path(__file__).parent,
                          env={**clean, "HOME": str(folder), **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("what", CODES)
def test_nothing_is_reported(what, tiny, tmp_path):
    if "OpenVINO" in what:
        pytest.importorskip("openvino")
    assert home_after(CODES[what], tmp_path, tiny) == []


def test_the_users_own_wish_is_respected():
    code = "import os, pidiff; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    said = lambda **env: subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, cwd=Path(__file__).parent, text=True,
                                        capture_output=True, check=True).stdout
    assert said(ORT_DISABLE_TELEMETRY="0") == "0\n"
