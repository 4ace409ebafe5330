// Group normalisation (arXiv 1803.08494) of pictures whose channels lie together, with what a residual block of Stable Diffusion
// does right before and after:
//
//   out = silu((x + shift - mean) / sqrt(variance + epsilon) * weight + bias)
//
// with mean and variance (biased) of each picture's groups of channels. Arithmetic is float32 whatever the storage.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace pidiff {

struct GroupNormParams {
  const void* x = nullptr;        // [batch, rows, channels], contiguous
  const void* shift = nullptr;    // [shifts, channels], shifts 1 or batch; null for none
  const float* weight = nullptr;  // [channels]
  const float* bias = nullptr;    // [channels]
  void* out = nullptr;            // [batch, rows, channels]; may be x
  std::int64_t batch = 0, rows = 0, channels = 0, groups = 0, shifts = 1;
  float epsilon = 1e-5f;
  bool silu = false;
  DType dtype = DType::float32;
};

// As `attention`, but that all implementations compute in float32: `automatic` takes the last.
void group_norm(const GroupNormParams& params, const Parallel& pool, Implementation implementation = Implementation::automatic);

}  // namespace pidiff
