// The two attention primitives of PIDiff. One contract, several implementations, std only.
//
//   attention     out = softmax(scale * q k^T) v                                    (every attention layer)
//   identity_mix  out = h + id_scale * sum_p mask_p * softmax(y A_p) V_p per head   (the folded identity term)
//
// Arrays hold `dtype` elements. The last axis is always contiguous; every other axis has its stride, in elements.
// Arithmetic is float32 whatever the storage, but for one implementation that nobody gets without asking. Carriers
// (pybind11, ONNX Runtime, TensorRT, torch) only fill these structs and call: no carrier contains maths.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/parallel.h"

namespace pidiff {

enum class DType : std::uint8_t { float32, float16, bfloat16 };

// Bytes of one element.
constexpr std::size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

struct AttentionParams {
  const void* q = nullptr;  // [batch, queries, heads, head_dim]
  const void* k = nullptr;  // [batch, keys, heads, head_dim]
  const void* v = nullptr;  // [batch, keys, heads, head_dim]
  void* out = nullptr;      // [batch, queries, heads, head_dim]; may not overlap the inputs
  std::int64_t batch = 0, queries = 0, keys = 0, heads = 0, head_dim = 0;
  struct Strides {
    std::int64_t batch = 0, token = 0, head = 0;
  } q_stride, k_stride, v_stride, out_stride;
  float scale = 1.0f;  // multiplies the logits; 1/sqrt(head_dim) in every model here
  DType dtype = DType::float32;
};

struct IdentityMixParams {
  const void* h = nullptr;         // [batch, queries, channels]: the text attention's result
  const void* y = nullptr;         // [batch, queries, channels]: what the identity attends with (x, or h itself)
  const void* a = nullptr;         // [batch, people, channels, heads * columns], contiguous; 1/sqrt(d) folded in
  const void* v = nullptr;         // [batch, people, tokens, channels], contiguous
  const void* mask = nullptr;      // [batch, people, queries], contiguous, in [0, 1]
  const void* id_scale = nullptr;  // [batch]
  void* out = nullptr;             // [batch, queries, channels]; may be h itself
  void* id_mass = nullptr;         // [batch, people, queries], contiguous: mean over heads of 1 - p[null]; 0 without null
  std::int64_t batch = 0, queries = 0, channels = 0, heads = 0, tokens = 0, people = 0;
  bool has_null = false;  // columns = tokens + 1, the null key last: it takes probability and gives nothing
  struct Strides {
    std::int64_t batch = 0, token = 0;
  } h_stride, y_stride, out_stride;
  DType dtype = DType::float32;

  std::int64_t columns() const { return tokens + (has_null ? 1 : 0); }
  std::int64_t head_dim() const { return heads > 0 ? channels / heads : 0; }
};

// Implementations, slowest first. `automatic` takes the last CPU one that this processor runs and that computes in
// float32. `avx512bf16` and `amx` do not: their `attention` rounds the operands of both products (q, k, weights, v) to bfloat16;
// sums and softmax stay float32, and so does identity_mix. `low_precision` is one of these for the `attention` of many
// keys where it is faster (`amx` where the processor has it, `avx512bf16` on AMD's; what it saves on few keys is little beside a
// layer's other work), else `automatic`.
enum class Implementation : std::uint8_t {
  automatic, low_precision, reference, portable, avx2, avx512, avx512bf16, amx, cuda
};

// Name <-> value; `parse_implementation` throws std::invalid_argument naming the choices.
const char* name_of(Implementation implementation);
Implementation parse_implementation(const std::string& name);
// What `automatic` and `low_precision` stand for where nothing is too small for rounding; others as they are.
Implementation resolve_rounding(Implementation wanted);

// CPU implementations that were compiled in and run on this processor: those in float32, slowest first, then the others.
std::vector<Implementation> cpu_implementations();

// Host pointers. Sizes are checked (std::invalid_argument); a CPU without the implementation gives std::runtime_error.
// `pool` runs the tasks; see parallel.h.
void attention(const AttentionParams& params, const Parallel& pool,
               Implementation implementation = Implementation::automatic);
void identity_mix(const IdentityMixParams& params, const Parallel& pool,
                  Implementation implementation = Implementation::automatic);

}  // namespace pidiff
