#include <pybind11/stl.h>

#include <cmath>
#include <optional>

#include "bindings/arrays.h"
#include "kernels/attention.h"
#include "kernels/group_norm.h"

#ifdef PIDIFF_HAS_CUDA
#include "kernels/attention_cuda.h"
#endif

namespace pidiff::bindings {
namespace {

std::int64_t head_dim(std::int64_t channels, std::int64_t num_heads) {
  if (num_heads < 1) fail("num_heads must be positive, got " + std::to_string(num_heads));
  if (channels < 1 || channels % num_heads != 0)
    fail("num_heads must divide the channels " + std::to_string(channels) + ", got " + std::to_string(num_heads));
  return channels / num_heads;
}

AttentionParams::Strides strides(const py::array& a, const char* name, std::int64_t dim) {
  return {stride(a, name, 0), stride(a, name, 1), dim};
}

py::array py_attention(const py::array& q, const py::array& k, const py::array& v, std::int64_t num_heads,
                       const std::string& implementation, const std::optional<py::array>& out, int threads) {
  const Implementation which = parse_implementation(implementation);
  require_shape(q, "q", {-1, -1, -1}, "[B, S, C]");
  require_shape(k, "k", {q.shape(0), -1, q.shape(2)}, "[B, T, C]");
  require_shape(v, "v", {k.shape(0), k.shape(1), k.shape(2)}, "[B, T, C]");
  if (k.shape(1) < 1) fail("k must have at least one key, got " + shape_of(k));
  AttentionParams p;
  if (threads < 0) fail("threads must not be negative, got " + std::to_string(threads));
  p.dtype = dtype_of(q, "q", true);
  require_dtype(k, "k", q, "q");
  require_dtype(v, "v", q, "q");
  p.batch = q.shape(0);
  p.queries = q.shape(1);
  p.keys = k.shape(1);
  p.heads = num_heads;
  p.head_dim = head_dim(q.shape(2), num_heads);
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  py::array result = out ? *out : empty(q.dtype(), {q.shape(0), q.shape(1), q.shape(2)});
  require_shape(result, "out", {q.shape(0), q.shape(1), q.shape(2)}, "[B, S, C]");
  require_dtype(result, "out", q, "q");
  if (!result.writeable()) fail("out must be writable, got a read-only array");
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = result.mutable_data();
  p.q_stride = strides(q, "q", p.head_dim);
  p.k_stride = strides(k, "k", p.head_dim);
  p.v_stride = strides(v, "v", p.head_dim);
  p.out_stride = strides(result, "out", p.head_dim);
  {
    py::gil_scoped_release release;
    attention(p, own_threads(threads), which);
  }
  return result;
}

std::pair<py::array, py::array> py_identity_mix(const py::array& h, const py::array& y, const py::array& a,
                                                const py::array& v_id, const py::array& mask, const py::array& scale,
                                                std::int64_t num_heads, bool has_null,
                                                const std::string& implementation) {
  const Implementation which = parse_implementation(implementation);
  require_shape(h, "h", {-1, -1, -1}, "[B, S, C]");
  const py::ssize_t batch = h.shape(0), queries = h.shape(1), channels = h.shape(2);
  require_shape(y, "y", {batch, queries, channels}, "[B, S, C]");
  require_shape(v_id, "v_id", {batch, -1, -1, channels}, "[B, P, T, C]");
  const py::ssize_t people = v_id.shape(1), tokens = v_id.shape(2);
  if (tokens < 1) fail("v_id must have at least one token, got " + shape_of(v_id));
  head_dim(channels, num_heads);
  require_shape(a, "a", {batch, people, channels, num_heads * (tokens + (has_null ? 1 : 0))},
                has_null ? "[B, P, C, num_heads * (T + 1)]" : "[B, P, C, num_heads * T]");
  require_shape(mask, "mask", {batch, people, queries}, "[B, P, S]");
  require_shape(scale, "scale", {batch}, "[B]");
  IdentityMixParams p;
  p.dtype = dtype_of(h, "h", true);
  const std::pair<const py::array*, const char*> others[] = {
      {&y, "y"}, {&a, "a"}, {&v_id, "v_id"}, {&mask, "mask"}, {&scale, "scale"}};
  for (const auto& [array, name] : others) require_dtype(*array, name, h, "h");
  for (const auto& [array, name] : others)
    if (array != &y) require_contiguous(*array, name);
  py::array out = empty(h.dtype(), {batch, queries, channels});
  py::array mass = empty(h.dtype(), {batch, people, queries});
  p.h = h.data();
  p.y = y.data();
  p.a = a.data();
  p.v = v_id.data();
  p.mask = mask.data();
  p.id_scale = scale.data();
  p.out = out.mutable_data();
  p.id_mass = mass.mutable_data();
  p.batch = batch;
  p.queries = queries;
  p.channels = channels;
  p.heads = num_heads;
  p.tokens = tokens;
  p.people = people;
  p.has_null = has_null;
  p.h_stride = {stride(h, "h", 0), stride(h, "h", 1)};
  p.y_stride = {stride(y, "y", 0), stride(y, "y", 1)};
  p.out_stride = {stride(out, "out", 0), stride(out, "out", 1)};
  {
    py::gil_scoped_release release;
    identity_mix(p, own_threads(), which);
  }
  return {out, mass};
}

const float* channel_values(const py::array& values, const char* name, std::int64_t channels) {
  require_shape(values, name, {channels}, "[C]");
  return float32_values(values, name);
}

py::array py_group_norm(const py::array& x, const py::array& weight, const py::array& bias, std::int64_t num_groups,
                        const std::optional<py::array>& shift, bool silu, float epsilon, const std::string& implementation,
                        const std::optional<py::array>& out, int threads) {
  const Implementation which = parse_implementation(implementation);
  require_shape(x, "x", {-1, -1, -1}, "[B, S, C]");
  require_contiguous(x, "x");
  const std::int64_t channels = x.shape(2);
  if (num_groups < 1 || channels < 1 || channels % num_groups != 0)
    fail("num_groups must divide the channels " + std::to_string(channels) + ", got " + std::to_string(num_groups));
  if (threads < 0) fail("threads must not be negative, got " + std::to_string(threads));
  if (!(epsilon > 0)) fail("epsilon must be positive, got " + std::to_string(epsilon));
  GroupNormParams p;
  p.dtype = dtype_of(x, "x", true);
  p.weight = channel_values(weight, "weight", channels);
  p.bias = channel_values(bias, "bias", channels);
  if (shift) {
    require_shape(*shift, "shift", {shift->ndim() > 0 && shift->shape(0) == 1 ? 1 : x.shape(0), channels}, "[1 or B, C]");
    require_dtype(*shift, "shift", x, "x");
    require_contiguous(*shift, "shift");
    p.shift = shift->data();
    p.shifts = shift->shape(0);
  }
  py::array result = out ? *out : empty(x.dtype(), {x.shape(0), x.shape(1), x.shape(2)});
  require_shape(result, "out", {x.shape(0), x.shape(1), x.shape(2)}, "[B, S, C]");
  require_dtype(result, "out", x, "x");
  require_contiguous(result, "out");
  if (!result.writeable()) fail("out must be writable, got a read-only array");
  p.x = x.data();
  p.out = result.mutable_data();
  p.batch = x.shape(0);
  p.rows = x.shape(1);
  p.channels = channels;
  p.groups = num_groups;
  p.epsilon = epsilon;
  p.silu = silu;
  {
    py::gil_scoped_release release;
    group_norm(p, own_threads(threads), which);
  }
  return result;
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("attention", &py_attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("num_heads"),
        py::arg("implementation") = "auto", py::arg("out") = py::none(), py::arg("threads") = 0,
        "softmax(q k^T / sqrt(C / num_heads)) v per head.\n\n"
        "q [B, S, C], k and v [B, T, C], float32, float16 or bfloat16 (ml_dtypes' or its bits as uint16), contiguous along\n"
        "the last axis; returns [B, S, C] in the same dtype: `out` if given, which may not overlap the others. threads: at\n"
        "most so many of the pool's (`start_threads`), 0 for all. Arithmetic is float32, but for\n"
        "implementation=\"avx512bf16\" and \"amx\", which round the operands of both products to bfloat16, and \"low\", which is\n"
        "one of these from 512 keys on where that is faster (\"amx\" where it runs, else \"avx512bf16\" on AMD's processors),\n"
        "else \"auto\".");
  m.def("identity_mix", &py_identity_mix, py::arg("h"), py::arg("y"), py::arg("a"), py::arg("v_id"), py::arg("mask"),
        py::arg("scale"), py::arg("num_heads"), py::arg("has_null"), py::arg("implementation") = "auto",
        "The folded identity term with its residual add: h + scale * sum_p mask_p * softmax(y a_p) v_p, per head.\n\n"
        "h and y [B, S, C], a [B, P, C, num_heads * T'] with T' = T + 1 (null key last) or T, v_id [B, P, T, C],\n"
        "mask [B, P, S], scale [B]. Returns (out [B, S, C], id_mass [B, P, S]): id_mass is the probability that went\n"
        "to real identity tokens, averaged over heads, and zero without a null key.");
  m.def("group_norm", &py_group_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("num_groups"),
        py::arg("shift") = py::none(), py::arg("silu") = false, py::arg("epsilon") = 1e-5f, py::arg("implementation") = "auto",
        py::arg("out") = py::none(), py::arg("threads") = 0,
        "Group normalisation (arXiv 1803.08494) of x + shift, over positions and each group's channels; then SiLU if `silu`.\n\n"
        "x [B, S, C], float32, float16 or bfloat16 (ml_dtypes' or its bits as uint16), shift [1 or B, C] in the same dtype, weight and\n"
        "bias [C] float32; returns [B, S, C] in x's dtype: `out` if given, which may be x. threads: as in `attention`. All\n"
        "implementations compute in float32; \"auto\" takes the last.");
  m.def(
      "cpu_implementations",
      [] {
        std::vector<std::string> names;
        for (auto one : cpu_implementations()) names.emplace_back(name_of(one));
        return names;
      },
      "CPU implementations that run on this machine, slowest first; \"auto\" takes the last that computes in float32.");
  m.def(
      "implementation_of", [](const std::string& name) { return name_of(resolve_rounding(parse_implementation(name))); }, py::arg("name"),
      "What \"auto\" or \"low\" stands for on this machine where nothing is too small for rounding; another name as it is.");
  m.def("start_threads", &start_threads,
        "Start the kernels' own threads, once, and return how many there are, the caller's included: PIDIFF_NUM_THREADS, else\n"
        "OMP_NUM_THREADS, else the processors that the calling thread may use. The first kernel does it otherwise.");
  m.def(
      "has_cuda",
      [] {
#ifdef PIDIFF_HAS_CUDA
        return cuda_available();
#else
        return false;
#endif
      },
      "Whether CUDA kernels were compiled in and a device is there to run them.");
}

}  // namespace pidiff::bindings
