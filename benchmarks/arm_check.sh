#!/usr/bin/env bash
# The whole runtime on 64-bit Arm without an Arm machine: cross-compiles the core, lays an Arm Python out of Debian's and PyPI's
# packages, runs tests of kernels, loop and runtime under qemu, and draws a picture of `mini` there and here, which must be the same
# but for rounding. It says nothing about time.
#
#   benchmarks/arm_check.sh [folder for what it downloads and builds, default build/arm]
#
# Needs x86-64 Debian with aarch64-linux-gnu-g++, cmake, network, and `python3` with pidiff and its extra `dev` (PYTHON names another;
# DEBIAN_MIRROR another archive than the one that apt uses here).
# Nothing is installed on the system. Exit status: 0 all was right, else 1.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "${1:-$root/build/arm}"
work="$(cd "${1:-$root/build/arm}" && pwd)"
python="$(command -v "${PYTHON:-python3}")"
debian="$work/debian" site="$work/site"
mirror="${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(SITE)' 'Label: Debian' | head -1)}"
tests=(test_attention test_identity_mix test_group_norm test_loop test_sampling test_runtime_parts test_runtime)

packages() {  # suite, architecture, folder, names: unpack Debian packages into a folder, by an apt state of its own
  local state="$work/apt-$1-$2" options
  mkdir -p "$state"/{lists/partial,cache/archives/partial,debs} "$3"
  echo "deb [arch=$2 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" > "$state/sources.list"
  options=(-o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache" -o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=/dev/null
           -o Dir::State::status=/dev/null -o "APT::Architecture=$2" -o "APT::Architectures=$2" -o APT::Sandbox::User=root -qq)
  apt-get "${options[@]}" update
  (cd "$state/debs" && apt-get "${options[@]}" download "${@:4}")
  for deb in "$state"/debs/*.deb; do dpkg-deb -x "$deb" "$3"; done
}

wheels() {  # names: unpack PyPI's wheels for Arm
  local options=(--python-version 311 --only-binary=:all:) tag
  for tag in manylinux_2_28_aarch64 manylinux_2_27_aarch64 manylinux_2_17_aarch64 manylinux2014_aarch64; do options+=(--platform "$tag"); done
  "$python" -m pip download -qq -d "$work/wheels" "${options[@]}" "$@"
  for wheel in "$work"/wheels/*.whl; do unzip -q -o "$wheel" -d "$site"; done
}

rm -rf "$site"
mkdir -p "$site"
echo "== packages"
# Before 8.1 qemu shows programs this machine's /proc/cpuinfo, at which ONNX Runtime crashes.
packages trixie amd64 "$work/qemu" qemu-user
packages bookworm arm64 "$debian" python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 zlib1g libssl3 libffi8 \
  libexpat1 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libpython3.11-dev
wheels numpy onnxruntime opencv-python-headless tokenizers safetensors tqdm onnx pytest

echo "== build"
cmake -S "$root" -B "$work/cmake" -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DPIDIFF_CUDA=OFF -DPython_EXECUTABLE="$python" \
  "-DPython_INCLUDE_DIR=$debian/usr/include/python3.11" "-DCMAKE_CXX_FLAGS=-isystem $debian/usr/include" \
  "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)" > "$work/build.log"
cmake --build "$work/cmake" -j"$(nproc)" >> "$work/build.log"
cp -r "$root/pidiff" "$site/"
rm -f "$site"/pidiff/_C.*.so
mkdir -p "$site/pidiff/lib" "$site/pidiff/models"
cp -r "$root/runtime" "$root/export" "$site/pidiff/"
cp -r "$root/models/mini" "$site/pidiff/models/"
cp "$work"/cmake/_C.*.so "$site/pidiff/_C.cpython-311-aarch64-linux-gnu.so"
cp "$work/cmake/libpidiff_ort.so" "$site/pidiff/lib/"

arm() {
  "$work/qemu/usr/bin/qemu-aarch64" -L "$debian" -E "LD_LIBRARY_PATH=$debian/lib/aarch64-linux-gnu:$debian/usr/lib/aarch64-linux-gnu" \
    -E "PYTHONHOME=$debian/usr" -E "PYTHONPATH=$site" -E PYTHONDONTWRITEBYTECODE=1 -E PIDIFF_CACHE=off "$debian/usr/bin/python3.11" "$@"
}
cd "$root/tests"  # where no folder hides the package
arm -c 'import platform, pidiff._C as c; print("==", platform.machine(), c.cpu_implementations())'

echo "== tests"
failed=0
# Without pictures of mini, which take minutes each.
arm -m pytest -q -p no:cacheprovider -o addopts= -m "not slow" -k "not mini" "--rootdir=$root/tests" "${tests[@]/%/.py}" 2>&1 | tail -15 || failed=1

echo "== a picture"
draw=(--face "$root/examples/person-1.jpg" --prompt "a photo of a smiling person, blue background" --seed 1 --json --out)
main='import sys; from pidiff.runtime.__main__ import generate; sys.exit(generate(sys.argv[1:]))'
arm -c "$main" "${draw[@]}" "$work/arm.png"
"$python" -c "$main" "${draw[@]}" "$work/here.png" > /dev/null
"$python" - "$work" << 'END' || failed=1
import sys

import cv2
import numpy as np

arm, here = (cv2.imread(f"{sys.argv[1]}/{name}.png").astype(int) for name in ("arm", "here"))
difference = np.abs(arm - here)
print(f"grey levels between the pictures: at most {difference.max()}, {difference.mean():.4f} in the mean")
sys.exit(int(here.std() < 10 or difference.max() > 2))
END
[ "$failed" -eq 0 ] && echo "== all was right"
exit "$failed"
