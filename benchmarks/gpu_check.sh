#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build with CUDA, run the tests marked `cuda`, time attention with the
# fused identity term against PyTorch's scaled_dot_product_attention pair plus add at Stable Diffusion 1.5's shapes, time a
# whole UNet step and whole pictures of that size against diffusers (gpu_step.py, gpu_picture.py), and draw a picture of `mini`
# by every engine for GPUs that is here, compared with ONNX Runtime's on the processor.
#
#   benchmarks/gpu_check.sh [folder for the build and the logs, default build/gpu]
#
# Needs Python >= 3.10 with numpy, nvcc, g++, cmake. What else a section needs and is not there makes it be skipped; what
# fails leaves the other sections alone; both are listed at the end, under a short table. No network: it configures with
# cmake directly, and takes pybind11's headers from PyTorch where the package itself is missing. Environment:
#   PIDIFF_STEP_GRAPHS   folder with the graphs of gpu_graphs.py; without them ONNX Runtime is left out of the step
#   PIDIFF_GPU_SECONDS   how long all of it may take (default 900): what has no time left is skipped
#   PIDIFF_PICTURES      folder of gpu_picture.py with its model and bundle (--prepare); without it no pictures of that size are timed
#   PIDIFF_BUNDLE        a bundle with TensorRT engines for this GPU, in place of one made of `mini`
#   OUT                  where the log and the results go (default: the folder)
# Exit status: 0 all that could run was right, else 1.
set -uo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "${1:-$root/build/gpu}"
work="$(cd "${1:-$root/build/gpu}" && pwd)"
out="${OUT:-$work}"
python="${PYTHON:-python3}"
limit="${PIDIFF_GPU_SECONDS:-900}"
skipped=() failed=() notes=()
skip() { skipped+=("$1"); echo "skipped: $1"; }
fail() { failed+=("$1"); echo "FAILED: $1"; }
left() { echo $((limit - SECONDS)); }
section() { echo "== $1 (at $SECONDS s)"; }
within() { timeout -k 2 "$(($1 < $(left) ? $1 : $(left) > 1 ? $(left) : 1))" "${@:2}"; }  # seconds, command
missing() {  # names of the Python modules among the arguments that are not there
  "$python" -c 'import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])' "$@"
}
exec > >(tee "$out/gpu_check.log") 2>&1
tee=$!

command -v nvidia-smi > /dev/null || { echo "gpu_check needs an NVIDIA GPU, found no nvidia-smi" >&2; exit 1; }
arch="${PIDIFF_CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')}"
nvcc="$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)"
echo "== $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1), sm_$arch, $("$nvcc" --version | tail -2 | head -1)"

# The package as it is installed: the folders of the repository, and soon what is built.
site="$work/site"
library="$work/libgpu_attention.so"
rm -rf "$site" "$library" "$work/step" "$work/mini-standard"
mkdir -p "$site" "$work/step"
cp -r "$root/pidiff" "$site/"
rm -f "$site"/pidiff/_C.*.so  # of another build, where there is one
mkdir -p "$site/pidiff/lib" "$site/pidiff/models"
cp -r "$root/runtime" "$root/export" "$site/pidiff/"
[ ! -d "$root/models/mini" ] || cp -r "$root/models/mini" "$site/pidiff/models/"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
cd "$work"  # where no folder hides the package

# --- the step: its processes get ready while the rest is built, and are timed when the GPU is quiet ---

step=
absent="$(missing torch diffusers safetensors)"
if [ -n "$absent" ]; then
  skip "a step of Stable Diffusion's size: needs $absent"
else
  [ -z "${PIDIFF_STEP_GRAPHS:-}" ] || cp "$PIDIFF_STEP_GRAPHS"/unet-*.onnx "$work/step/"
  ways=(diffusers ours compiled)
  if "$python" -c 'import sys, onnxruntime as o; sys.exit("CUDAExecutionProvider" not in o.get_available_providers())' 2> /dev/null; then
    ways=(diffusers ours runtime ort-fused compiled ort-fused-nhwc ort-standard-23 ort-standard)
  fi
  "$python" "$root/benchmarks/gpu_step.py" --root "$work/step" --library "$library" --hold "$work/step/go" --seconds "$(($(left) - 15))" \
    --out "$out/gpu_step.json" "${ways[@]}" > "$out/gpu_step.md" 2> "$work/step/driver.log" &
  step=$!
fi

# --- build ---

build() {
  local options=(-DCMAKE_BUILD_TYPE=Release -DPIDIFF_CUDA=ON "-DCMAKE_CUDA_COMPILER=$nvcc" "-DCMAKE_CUDA_ARCHITECTURES=$arch-real"
                 "-DPython_EXECUTABLE=$(command -v "$python")") folder
  if folder="$("$python" -m pybind11 --cmakedir 2> /dev/null)"; then
    options+=("-Dpybind11_DIR=$folder")
  else
    folder="$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')"
    [ -f "$folder/pybind11/pybind11.h" ] || { echo "pybind11 must be installed (or come with PyTorch), found neither"; return 1; }
    options+=("-DPIDIFF_PYBIND11_INCLUDE=$folder")
  fi
  cmake -S "$root" -B "$work/cmake" "${options[@]}" && cmake --build "$work/cmake" -j"$(nproc)" || return 1
  cp "$work"/cmake/_C.*.so "$site/pidiff/" && cp "$work/cmake/libpidiff_ort.so" "$site/pidiff/lib/"
}

section build
within 300 "$nvcc" -std=c++17 -O3 -shared -Xcompiler -fPIC "-arch=sm_$arch" "-I$root/csrc" -o "$library.part" \
  "$root/benchmarks/gpu_attention.cu" "$root/csrc/kernels/attention_cuda.cu" > "$work/nvcc.log" 2>&1 &
attention=$!
built=1
build > "$work/build.log" 2>&1 || { built=; fail build; tail -30 "$work/build.log"; }
wait "$attention" || { tail -30 "$work/nvcc.log"; fail "build of the attention kernels"; : > "$library.part"; }
mv "$library.part" "$library"  # the step's processes wait for it: the package is whole now

# --- right or wrong ---

runtime_lacks="$(missing onnxruntime cv2 tokenizers safetensors tqdm)"
export_lacks="$(missing torch diffusers transformers onnx onnxscript)"
exporting=
if [ -n "$built" ]; then
  if [ -z "$export_lacks$runtime_lacks" ] && [ -d "$site/pidiff/models/mini" ]; then
    within 120 "$python" -m pidiff.export mini "$work/mini-standard" --attention standard --report none --quiet > "$work/export.log" 2>&1 &
    exporting=$!
  fi
  section tests
  "$python" -c "import pidiff._C as c; print(c.__file__, 'sees a GPU' if c.has_cuda() else 'sees no GPU')"
  if [ -n "$(missing pytest)" ]; then
    skip "tests marked cuda: needs pytest"
  else
    spread=()
    [ -n "$(missing xdist)" ] || spread=(-n 4)
    within 240 "$python" -m pytest "$root"/tests/test_cuda.py "$root"/tests/test_cuda_loop.py -q -p no:cacheprovider -o addopts= -m cuda "${spread[@]}" --rootdir "$root/tests" ||
      fail "tests marked cuda"
  fi
fi

# --- times, one thing after the other ---

if [ -n "$step" ]; then
  section "waiting until the step's processes are ready"
  while kill -0 "$step" 2> /dev/null && [ ! -e "$work/step/ready" ] && [ "$(left)" -gt 50 ]; do sleep 0.2; done
  [ -n "$exporting" ] && wait "$exporting"
  echo "ready: $(cat "$work/step/ready" 2> /dev/null)"
fi

section attention
if [ -z "$built" ]; then
  skip "attention against PyTorch: not built"
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  within 60 "$python" "$root/benchmarks/gpu_attention.py" "$library" > "$out/gpu_attention.md" || fail "attention against PyTorch"
  cat "$out/gpu_attention.md"
else
  skip "attention against PyTorch: PyTorch with CUDA is not installed"
fi

if [ -n "$step" ]; then
  section "a step of Stable Diffusion's size"
  touch "$work/step/go"
  wait "$step" || fail "a step of Stable Diffusion's size"
  tail -5 "$work/step/driver.log"
  for log in "$work"/step/*.log; do echo "--- $(basename "$log")"; tail -15 "$log"; done > "$out/gpu_step.log"
fi

picture() {  # bundle, engine, name of the section
  section "$3"
  if [ "$(left)" -lt 8 ]; then skip "$3: no time left"; return; fi
  notes+=("$3: $(within 90 "$python" "$root/benchmarks/gpu_engines.py" "$1" --engine "$2" 2> "$work/engine.log" | tail -1)")
  local status=$?
  echo "${notes[-1]}"
  [ "$status" -eq 0 ] || { fail "$3"; tail -5 "$work/engine.log"; }
}

if [ -n "$runtime_lacks" ] || [ -z "$built" ] || [ ! -d "$site/pidiff/models/mini" ]; then
  skip "onnxruntime on CUDA: needs a build, models/mini, $runtime_lacks"
elif "$python" -c 'import sys, onnxruntime as o; sys.exit("CUDAExecutionProvider" not in o.get_available_providers())'; then
  picture "$site/pidiff/models/mini" onnxruntime "onnxruntime on CUDA, fused attention"
  if [ -f "$work/mini-standard/manifest.json" ]; then
    picture "$work/mini-standard" onnxruntime "onnxruntime on CUDA, standard attention"
  else
    skip "onnxruntime on CUDA, standard attention: no bundle: $export_lacks $(tail -1 "$work/export.log" 2> /dev/null)"
  fi
else
  skip "onnxruntime on CUDA: this onnxruntime has no CUDAExecutionProvider"
fi

if [ -z "${PIDIFF_PICTURES:-}" ] || [ -n "$absent$runtime_lacks" ] || [ -z "$built" ]; then
  skip "pictures of Stable Diffusion's size: needs PIDIFF_PICTURES, a build $absent $runtime_lacks"
else
  section "pictures of Stable Diffusion's size"
  within 180 "$python" "$root/benchmarks/gpu_picture.py" --work "$PIDIFF_PICTURES" --out "$out/gpu_picture.json" > "$out/gpu_picture.md" || fail "pictures of Stable Diffusion's size"
  cat "$out/gpu_picture.md"
fi

engine_picture() {  # engine, how the bundle is exported
  local name="$1${2:+ $2}" bundle="${PIDIFF_BUNDLE:-$work/$1${2// /}}" log="$work/$1${2// /}.log"
  section "$name"
  if [ -z "${PIDIFF_BUNDLE:-}" ]; then
    rm -rf "$bundle"
    # shellcheck disable=SC2086
    within 300 "$python" -m pidiff.export mini "$bundle" $2 --quiet --report none --engine "$1" --target host > "$log" 2>&1
  fi
  if [ -d "$bundle" ]; then
    "$python" -m pidiff.export --check "$bundle" || echo "(exit status $? of --check)"
    picture "$bundle" "$1" "$name"
  elif grep -q "must be host or among" "$log"; then
    skip "$name: $(tail -1 "$log")"
  else
    fail "engines of $name: $(tail -1 "$log")"
  fi
}

for engine in tensorrt-rtx tensorrt; do
  if [ -n "$(missing "${engine//-/_}")$runtime_lacks" ] || [ -z "$built" ]; then
    skip "$engine: needs a build and ${engine//-/_} $runtime_lacks"
  elif [ -n "${PIDIFF_BUNDLE:-}" ]; then
    engine_picture "$engine" ""
  elif [ -n "$export_lacks" ]; then
    skip "$engine: pidiff-export needs $export_lacks (or give PIDIFF_BUNDLE)"
  else
    engine_picture "$engine" --fp16
    engine_picture "$engine" "--fp16 --int8"
  fi
done

# --- what was found ---

echo
echo "== results ($SECONDS s)"
[ ! -f "$out/gpu_attention.md" ] || grep -E "^\| (dtype|---|float16)|^WRONG" "$out/gpu_attention.md"
[ ! -f "$out/gpu_step.md" ] || cat "$out/gpu_step.md"
[ ! -f "$out/gpu_picture.md" ] || cat "$out/gpu_picture.md"
printf '%s\n' "${notes[@]:-no pictures}"
printf 'skipped: %s\n' "${skipped[@]:-nothing}"
printf 'failed: %s\n' "${failed[@]:-nothing}"
exec >&- 2>&-  # and let the log be whole before this ends
wait "$tee"
[ "${#failed[@]}" -eq 0 ]
