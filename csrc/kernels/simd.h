// Vectors of PIDIFF_LANES floats (GCC/Clang vector extensions) for the file that includes this; see attention_cpu.h
// for why everything is private to it. Include once per instruction set, after defining PIDIFF_LANES.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/half.h"

#define PIDIFF_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define PIDIFF_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PIDIFF_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Mask{i, j, k, l})
#endif
#define PIDIFF_LAMBDA_INLINE __attribute__((always_inline))

namespace pidiff {
namespace {

constexpr int kLanes = PIDIFF_LANES;

template <int Lanes>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * Lanes)));
  typedef float Unaligned __attribute__((vector_size(4 * Lanes), aligned(4), may_alias));
  typedef std::int32_t Int __attribute__((vector_size(4 * Lanes)));
};
using Float = Vector<kLanes>::Float;
using Int = Vector<kLanes>::Int;

template <int Lanes = kLanes>
PIDIFF_INLINE typename Vector<Lanes>::Float load(const float* from) {
  return *reinterpret_cast<const typename Vector<Lanes>::Unaligned*>(from);
}
template <int Lanes = kLanes>
PIDIFF_INLINE void store(float* to, typename Vector<Lanes>::Float value) {
  *reinterpret_cast<typename Vector<Lanes>::Unaligned*>(to) = value;
}

PIDIFF_INLINE Float splat(float value) { return value - Float{}; }

// The second operand wins where the first is NaN-free and not larger; a NaN in `b` is kept.
PIDIFF_INLINE Float maximum(Float a, Float b) { return a > b ? a : b; }

// 2^x with a relative error below 2 ulp; x below -126 gives at most 2^-126, NaN stays NaN, large x infinity.
PIDIFF_INLINE Float exp2(Float x) {
  x = x < splat(-126.0f) ? splat(-126.0f) : x;
  x = x > splat(128.0f) ? splat(128.0f) : x;
  const Float shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Float rounded = x + shifter;
  const Float f = x - (rounded - shifter);  // [-0.5, 0.5]
  Float y = splat(1.5403530e-4f);           // Taylor coefficients of 2^f, ln(2)^k / k!
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  // Casts between vectors of one size keep the bits.
  const Int exponent = ((Int)rounded - (Int)shifter) << 23;
  return (Float)((Int)y + exponent);
}

// `count` halves to floats and back.
PIDIFF_INLINE void widen(const std::uint16_t* from, float* to, std::int64_t count) {
  std::int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#elif defined(__aarch64__)
  for (; i + 4 <= count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
#endif
  for (; i < count; ++i) to[i] = half_to_float(from[i]);
}
PIDIFF_INLINE void narrow(const float* from, std::uint16_t* to, std::int64_t count) {
  std::int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  for (; i + 4 <= count; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
#endif
  for (; i < count; ++i) to[i] = float_to_half(from[i]);
}

// to[c * to_stride + r] = from[r * from_stride + c] * factor for r < rows, c < columns, in blocks of 4 x 4. (Left to
// itself the compiler takes scatter instructions, which are several times slower.)
PIDIFF_INLINE void transpose(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                             float factor, float* to, std::int64_t to_stride) {
  using Four = Vector<4>::Float;
  using Mask = Vector<4>::Int;
  std::int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* line = from + r * from_stride;
    std::int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const Four a = load<4>(line + c), b = load<4>(line + from_stride + c);
      const Four d = load<4>(line + 2 * from_stride + c), e = load<4>(line + 3 * from_stride + c);
      const Four low_ab = PIDIFF_SHUFFLE(a, b, 0, 4, 1, 5), high_ab = PIDIFF_SHUFFLE(a, b, 2, 6, 3, 7);
      const Four low_de = PIDIFF_SHUFFLE(d, e, 0, 4, 1, 5), high_de = PIDIFF_SHUFFLE(d, e, 2, 6, 3, 7);
      store<4>(to + c * to_stride + r, PIDIFF_SHUFFLE(low_ab, low_de, 0, 1, 4, 5) * factor);
      store<4>(to + (c + 1) * to_stride + r, PIDIFF_SHUFFLE(low_ab, low_de, 2, 3, 6, 7) * factor);
      store<4>(to + (c + 2) * to_stride + r, PIDIFF_SHUFFLE(high_ab, high_de, 0, 1, 4, 5) * factor);
      store<4>(to + (c + 3) * to_stride + r, PIDIFF_SHUFFLE(high_ab, high_de, 2, 3, 6, 7) * factor);
    }
    for (; c < columns; ++c)
      for (std::int64_t i = 0; i < 4; ++i) to[c * to_stride + r + i] = line[i * from_stride + c] * factor;
  }
  for (; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c] * factor;
}

// A register tile: sum[i][j] += a(i, k) * b[k][j] for k < depth, where b's rows are NV vectors, `ldb` floats apart.
// Depthwise: a(i, k) = a[k * lda + i] (a column of rows), else a[i * lda + k] (rows of a row-major matrix).
template <int MR, int NV, bool Depthwise>
PIDIFF_INLINE void multiply(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, std::int64_t depth,
                            Float (&sum)[MR][NV]) {
  for (std::int64_t k = 0; k < depth; ++k) {
    Float row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const float factor = Depthwise ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] += factor * row[j];
    }
  }
}

// Calls body(integral constant MR, first row) so that the tiles cover [0, rows).
template <int MR>
struct Rows {
  static constexpr int value = MR;
};
template <int MR, class Body>
PIDIFF_INLINE void tiles(std::int64_t rows, const Body& body) {
  std::int64_t i = 0;
  for (; i + MR <= rows; i += MR) body(Rows<MR>{}, i);
  if (MR > 4 && i + 4 <= rows) body(Rows<4>{}, i), i += 4;
  if (i + 2 <= rows) body(Rows<2>{}, i), i += 2;
  if (i < rows) body(Rows<1>{}, i);
}

}  // namespace
}  // namespace pidiff
