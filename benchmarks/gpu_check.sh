#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build with CUDA, run the tests marked `cuda`, time attention with the
# fused identity term against PyTorch's scaled_dot_product_attention pair plus add at Stable Diffusion 1.5's shapes.
#
#   benchmarks/gpu_check.sh [folder for the build and the log, default build/gpu]
#
# Needs Python >= 3.10 with numpy and pytest, nvcc, g++, cmake; PyTorch with CUDA for the comparison. No network: it
# configures with cmake directly, and takes pybind11's headers from PyTorch where the package itself is missing.
#
# STATE: written without a GPU at hand and not run on one yet. The kernels it tests are compiled in the normal build
# and checked on the CPU by tests/test_cuda_emulation.py.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
work="${1:-$root/build/gpu}"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
python="${PYTHON:-python3}"
arch="${PIDIFF_CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')}"
nvcc="$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)"

echo "== $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), sm_$arch, $("$nvcc" --version | tail -2 | head -1)"

options=(-DCMAKE_BUILD_TYPE=Release -DPIDIFF_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$arch-real"
         "-DPython_EXECUTABLE=$(command -v "$python")")
if folder="$("$python" -m pybind11 --cmakedir 2>/dev/null)"; then
  options+=("-Dpybind11_DIR=$folder")
else
  folder="$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')"
  [ -f "$folder/pybind11/pybind11.h" ] || { echo "pybind11 must be installed (or come with PyTorch), found neither" >&2; exit 1; }
  options+=("-DPIDIFF_PYBIND11_INCLUDE=$folder")
fi

echo "== build"
cmake -S "$root" -B "$work/cmake" "${options[@]}" > "$work/cmake.log" 2>&1 || { tail -30 "$work/cmake.log"; exit 1; }
cmake --build "$work/cmake" -j"$(nproc)" > "$work/build.log" 2>&1 || { tail -60 "$work/build.log"; exit 1; }
# The package as the tests import it: the three Python folders and what was just built.
rm -rf "$work/site"
mkdir -p "$work/site/pidiff/lib"
cp "$root"/pidiff/*.py "$work/site/pidiff/"
cp "$work"/cmake/_C.*.so "$work/site/pidiff/"
cp "$work/cmake/libpidiff_ort.so" "$work/site/pidiff/lib/"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"

echo "== tests"
"$python" -c "import pidiff._C as c; assert c.has_cuda(), 'no usable GPU'; print(c.__file__)"
"$python" -m pytest "$root/tests/test_cuda.py" -q -p no:cacheprovider -m cuda --rootdir "$root/tests"

echo "== speed"
"$nvcc" -std=c++17 -O3 -shared -Xcompiler -fPIC "-arch=sm_$arch" "-I$root/csrc" -o "$work/libgpu_attention.so" \
  "$root/benchmarks/gpu_attention.cu" "$root/csrc/kernels/attention_cuda.cu"
"$python" "$root/benchmarks/gpu_attention.py" "$work/libgpu_attention.so"
