#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build with CUDA, run the tests marked `cuda`, time attention with the
# fused identity term against PyTorch's scaled_dot_product_attention pair plus add at Stable Diffusion 1.5's shapes; build
# `mini`'s engines for this GPU, load them, compare a picture with ONNX Runtime's and time a step.
#
#   benchmarks/gpu_check.sh [folder for the build and the log, default build/gpu]
#
# Needs Python >= 3.10 with numpy and pytest, nvcc, g++, cmake; PyTorch with CUDA for the comparison of attention; for the
# engines tensorrt_rtx or tensorrt, onnxruntime, opencv, tokenizers, safetensors, tqdm, and what pidiff-export needs (or
# PIDIFF_BUNDLE: a bundle with engines for this GPU). What is not there is skipped, and listed at the end. No network: it
# configures with cmake directly, and takes pybind11's headers from PyTorch where the package itself is missing.
# Exit status: 0 all that could run was right, else 1.
#
# STATE: written without a GPU at hand and not run on one yet. The kernels it tests are compiled in the normal build
# and checked on the CPU by tests/test_cuda_emulation.py; the engine class on a fake driver by tests/test_tensorrt.py.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
work="${1:-$root/build/gpu}"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
python="${PYTHON:-python3}"
skipped=() failed=()
skip() { skipped+=("$1"); echo "skipped: $1"; }
fail() { failed+=("$1"); echo "FAILED: $1"; }

command -v nvidia-smi > /dev/null || { echo "gpu_check needs an NVIDIA GPU, found no nvidia-smi" >&2; exit 1; }
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
# The package as it is installed: the folders of the repository and what was just built.
site="$work/site"
rm -rf "$site"
mkdir -p "$site/pidiff/lib" "$site/pidiff/models"
cp "$root"/pidiff/*.py "$site/pidiff/"
cp -r "$root/runtime" "$root/export" "$site/pidiff/"
cp -r "$root/models/mini" "$site/pidiff/models/"
cp "$work"/cmake/_C.*.so "$site/pidiff/"
cp "$work/cmake/libpidiff_ort.so" "$site/pidiff/lib/"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
cd "$work"  # where no folder hides the package

echo "== tests"
"$python" -c "import pidiff._C as c; assert c.has_cuda(), 'no usable GPU'; print(c.__file__)"
"$python" -m pytest "$root/tests/test_cuda.py" -q -p no:cacheprovider -o addopts= -m cuda --rootdir "$root/tests" || fail "tests marked cuda"

echo "== attention"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  "$nvcc" -std=c++17 -O3 -shared -Xcompiler -fPIC "-arch=sm_$arch" "-I$root/csrc" -o "$work/libgpu_attention.so" \
    "$root/benchmarks/gpu_attention.cu" "$root/csrc/kernels/attention_cuda.cu"
  "$python" "$root/benchmarks/gpu_attention.py" "$work/libgpu_attention.so" || fail "attention against PyTorch"
else
  skip "attention against PyTorch: PyTorch with CUDA is not installed"
fi

missing() {  # names of the Python modules among the arguments that are not there
  "$python" -c 'import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])' "$@"
}

# Build the engines of `mini` in a new bundle; prints why not, or nothing.
build_engines() {
  local absent
  absent="$(missing torch diffusers transformers onnx onnxscript)"
  [ -z "$absent" ] || { echo "pidiff-export needs $absent (or give PIDIFF_BUNDLE)"; return; }
  rm -rf "$work/$1"
  "$python" -m pidiff.export mini "$work/$1" --fp16 --quiet --engine "$1" --target host > "$work/$1.log" 2>&1 ||
    tail -1 "$work/$1.log"
}

runtime_lacks="$(missing onnxruntime cv2 tokenizers safetensors tqdm)"
for engine in tensorrt-rtx tensorrt; do
  echo "== $engine"
  bundle="${PIDIFF_BUNDLE:-}"
  if [ -n "$runtime_lacks" ]; then
    skip "$engine: the runtime needs $runtime_lacks"
  elif [ -n "$(missing "${engine//-/_}")" ]; then
    skip "$engine: the Python module ${engine//-/_} is not installed"
  elif [ -z "$bundle" ] && why="$(build_engines "$engine")" && [ -n "$why" ]; then
    case "$why" in
      *"must be host or among"* | *"pidiff-export needs"*) skip "$engine: $why" ;;
      *) fail "engines of $engine: $why" ;;
    esac
  else
    bundle="${bundle:-$work/$engine}"
    "$python" -m pidiff.export --check "$bundle" || echo "(exit status $? of --check)"
    "$python" "$root/benchmarks/gpu_engines.py" "$bundle" --engine "$engine" || fail "a picture by $engine"
  fi
done

echo "== onnxruntime on CUDA"
if [ -n "$runtime_lacks" ]; then
  skip "onnxruntime: the runtime needs $runtime_lacks"
elif "$python" -c 'import sys, onnxruntime as o; sys.exit("CUDAExecutionProvider" not in o.get_available_providers())'; then
  "$python" "$root/benchmarks/gpu_engines.py" "$site/pidiff/models/mini" --engine onnxruntime || fail "a picture by onnxruntime on CUDA"
else
  skip "onnxruntime on CUDA: this onnxruntime has no CUDAExecutionProvider"
fi

echo "== never timed here: the step against diffusers eager and torch.compile"
printf 'skipped: %s\n' "${skipped[@]:-nothing}"
printf 'failed: %s\n' "${failed[@]:-nothing}"
[ "${#failed[@]}" -eq 0 ]
