// group_norm for one instruction set: vector lanes are channels. Included by attention_simd.h.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/attention_operands.h"
#include "kernels/simd.h"

namespace pidiff {
namespace {

// Rows [first, first + Rows): adds each channel's x - pivot and its square to sums [2, channels].
template <int Rows>
PIDIFF_INLINE void add_rows(const GroupNormParams& p, const float* pivot, std::int64_t first, float* sums, float* lines) {
  const std::int64_t channels = p.channels;
  const float* row[Rows];
  for (int i = 0; i < Rows; ++i) row[i] = row_of(p.x, (first + i) * channels, channels, p.dtype, lines + i * channels);
  std::int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Float sum = load(sums + c), squares = load(sums + channels + c);
    const Float middle = load(pivot + c);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Float x = load(row[i] + c) - middle;
      sum += x;
      squares += x * x;
    }
    store(sums + c, sum);
    store(sums + channels + c, squares);
  }
  for (; c < channels; ++c)
    for (int i = 0; i < Rows; ++i) {
      const float x = row[i][c] - pivot[c];
      sums[c] += x;
      sums[channels + c] += x * x;
    }
}

void norm_sums(const GroupNormParams& p, const float* pivot, std::int64_t first, std::int64_t rows, float* sums, float* lines) {
  std::memset(sums, 0, static_cast<std::size_t>(2 * p.channels) * sizeof(float));
  std::int64_t r = 0;
  for (; r + kNormLines <= rows; r += kNormLines) add_rows<kNormLines>(p, pivot, first + r, sums, lines);
  for (; r < rows; ++r) add_rows<1>(p, pivot, first + r, sums, lines);
}

// y / (1 + e^-y), by the exponential of -|y|.
template <int Terms>
PIDIFF_INLINE Float silu(Float y) {
  constexpr float log2e = 1.44269504088896340736f;
  const Float small = exp2<Terms>((y < 0.0f ? y : -y) * log2e);
  return y * (y < 0.0f ? small : splat(1.0f)) / (1.0f + small);
}

template <bool Silu, int Terms>
PIDIFF_INLINE void norm_row(const float* x, const float* factor, const float* offset, std::int64_t channels, float* to) {
  std::int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const Float y = load(x + c) * load(factor + c) + load(offset + c);
    store(to + c, Silu ? silu<Terms>(y) : y);
  }
  for (; c < channels; ++c) {
    const Float y = splat(x[c] * factor[c] + offset[c]);
    to[c] = (Silu ? silu<Terms>(y) : y)[0];
  }
}

void norm_rows(const GroupNormParams& p, const float* factor, const float* offset, std::int64_t first, std::int64_t rows, float* lines) {
  float* wide = lines + p.channels;
  for (std::int64_t r = first; r < first + rows; ++r) {
    const float* x = row_of(p.x, r * p.channels, p.channels, p.dtype, lines);
    float* to = p.dtype == DType::float32 ? static_cast<float*>(p.out) + r * p.channels : wide;
    if (!p.silu)
      norm_row<false, 6>(x, factor, offset, p.channels, to);
    else if (p.dtype == DType::bfloat16)
      norm_row<true, 4>(x, factor, offset, p.channels, to);
    else
      norm_row<true, 6>(x, factor, offset, p.channels, to);
    if (p.dtype != DType::float32) narrow(wide, static_cast<std::uint16_t*>(p.out) + r * p.channels, p.channels, p.dtype);
  }
}

}  // namespace
}  // namespace pidiff
