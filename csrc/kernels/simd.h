// Vectors of PIDIFF_LANES floats (GCC/Clang vector extensions) for the file that includes this; see attention_cpu.h
// for why everything is private to it. Include once per instruction set, after defining PIDIFF_LANES and
// PIDIFF_TILE.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/attention.h"
#include "kernels/half.h"

#define PIDIFF_INLINE inline __attribute__((always_inline))
#define PIDIFF_LAMBDA_INLINE __attribute__((always_inline))

namespace pidiff {
namespace {

constexpr int kLanes = PIDIFF_LANES;
constexpr int kTile = PIDIFF_TILE;  // rows of a register tile

template <int Lanes>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * Lanes)));
  typedef float Unaligned __attribute__((vector_size(4 * Lanes), aligned(4), may_alias));
  typedef std::int32_t Int __attribute__((vector_size(4 * Lanes)));
};
using Float = Vector<kLanes>::Float;
using Int = Vector<kLanes>::Int;
typedef std::uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t Bits16 __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

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
PIDIFF_INLINE Float minimum(Float a, Float b) { return a < b ? a : b; }

// Whether every lane is; a NaN is not.
PIDIFF_INLINE bool all_below(Float a, float limit) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(limit), _CMP_LT_OQ) == 0xffff;
#else
  const Int below = a < limit;
  bool all = true;
  for (int lane = 0; lane < kLanes; ++lane) all &= below[lane] != 0;
  return all;
#endif
}

// 2^x by 2^floor(x) and a polynomial of what is left, or by the nearest integer where that is what the instructions give.
// Fitted for the smallest relative error with 2^0 = 1: 1.7e-7 with the six terms of float32, 1.1e-4 with four: little
// beside the rounding to bfloat16 that follows (2e-3). From 2^127 on, infinity or 2^127; below 2^-126 at most that; NaN stays NaN.
template <int Terms = 6>
PIDIFF_INLINE Float exp2(Float x) {
  static_assert(Terms == 6 || Terms == 4, "terms");
#ifdef __AVX512DQ__
  constexpr float six[] = {6.931513118e-1f, 2.401644501e-1f, 5.579991339e-2f, 9.017029926e-3f, 1.867130257e-3f};
  constexpr float four[] = {6.951167893e-1f, 2.276449784e-1f, 7.706705371e-2f};
  const Float f = (Float)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);  // [0, 1)
#else
  constexpr float six[] = {6.931469776e-1f, 2.402224208e-1f, 5.550733744e-2f, 9.671512703e-3f, 1.326472724e-3f};
  constexpr float four[] = {6.932829275e-1f, 2.422109630e-1f, 5.500893135e-2f};
  x = maximum(splat(-126.0f), minimum(splat(127.0f), x));
  const Float shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Float rounded = x + shifter;
  const Float f = x - (rounded - shifter);  // [-0.5, 0.5]
#endif
  const float* term = Terms == 6 ? six : four;
  Float y = splat(term[Terms - 2]);
#pragma GCC unroll 8
  for (int i = Terms - 3; i >= 0; --i) y = y * f + term[i];
  y = y * f + 1.0f;
#ifdef __AVX512DQ__
  return (Float)_mm512_scalef_ps((__m512)y, (__m512)x);  // times 2^floor(x)
#else
  // Casts between vectors of one size keep the bits. The shift leaves nothing of the shifter: its low nine bits are 0.
  return (Float)((Int)y + ((Int)rounded << 23));
#endif
}

// `count` values of a 16-bit dtype to floats and back.
PIDIFF_INLINE void widen(const std::uint16_t* from, float* to, std::int64_t count, DType dtype) {
  std::int64_t i = 0;
  if (dtype == DType::bfloat16) {
    for (; i + kLanes <= count; i += kLanes)
      store(to + i, (Float)(__builtin_convertvector(*reinterpret_cast<const Bits16*>(from + i), Bits) << 16));
    for (; i < count; ++i) to[i] = bfloat_to_float(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#elif defined(__aarch64__)
  for (; i + 4 <= count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
#endif
  for (; i < count; ++i) to[i] = half_to_float(from[i]);
}
PIDIFF_INLINE void narrow(const float* from, std::uint16_t* to, std::int64_t count, DType dtype) {
  std::int64_t i = 0;
  if (dtype == DType::bfloat16) {
#ifdef PIDIFF_BF16
    for (; i + kLanes <= count; i += kLanes)  // but for numbers below 2^-126, which become zero
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh((__m512)load(from + i)));
#endif
    for (; i + kLanes <= count; i += kLanes) {  // as float_to_bfloat
      const Float value = load(from + i);
      const Bits bits = (Bits)value, nan = (Bits)(value != value);
      const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = bits >> 16 | 0x40;
      *reinterpret_cast<Bits16*>(to + i) = __builtin_convertvector((nan & quiet) | (~nan & rounded), Bits16);
    }
    for (; i < count; ++i) to[i] = float_to_bfloat(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  for (; i + 4 <= count; i += 4) vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i))));
#endif
  for (; i < count; ++i) to[i] = float_to_half(from[i]);
}

// One fixed order of the elements of two vectors.
template <int... I>
struct Order {
  template <class Vector>
  static PIDIFF_INLINE Vector of(Vector a, Vector b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, I...);
#else
    typedef std::int32_t Mask __attribute__((vector_size(4 * sizeof...(I))));
    return __builtin_shuffle(a, b, Mask{I...});
#endif
  }
};

// Groups of four elements, transposed each for itself: the orders that interleave single elements and pairs.
template <int Groups>
struct Interleave;
template <>
struct Interleave<1> {
  using Low = Order<0, 4, 1, 5>;
  using High = Order<2, 6, 3, 7>;
  using LowPair = Order<0, 1, 4, 5>;
  using HighPair = Order<2, 3, 6, 7>;
};
template <>
struct Interleave<2> {
  using Low = Order<0, 8, 1, 9, 4, 12, 5, 13>;
  using High = Order<2, 10, 3, 11, 6, 14, 7, 15>;
  using LowPair = Order<0, 1, 8, 9, 4, 5, 12, 13>;
  using HighPair = Order<2, 3, 10, 11, 6, 7, 14, 15>;
};
template <>
struct Interleave<4> {
  using Low = Order<0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>;
  using High = Order<2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>;
  using LowPair = Order<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>;
  using HighPair = Order<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>;
};

// Four elements from each of `Groups` rows that lie four rows apart.
template <int Groups>
PIDIFF_INLINE typename Vector<4 * Groups>::Float load_groups(const float* from, [[maybe_unused]] std::int64_t stride) {
  if constexpr (Groups == 1) return load<4>(from);
#ifdef __AVX__
  if constexpr (Groups == 2)
    return (Vector<8>::Float)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                                  _mm_loadu_ps(from + 4 * stride), 1);
#endif
#ifdef __AVX512F__
  if constexpr (Groups == 4) {
    __m512 all = _mm512_castps128_ps512(_mm_loadu_ps(from));
    all = _mm512_insertf32x4(all, _mm_loadu_ps(from + 4 * stride), 1);
    all = _mm512_insertf32x4(all, _mm_loadu_ps(from + 8 * stride), 2);
    return (Vector<16>::Float)_mm512_insertf32x4(all, _mm_loadu_ps(from + 12 * stride), 3);
  }
#endif
}

// Rows [r, r + 4 * Groups) of `transpose`, as often as they fit.
template <bool Scaled, int Groups>
PIDIFF_INLINE void transpose_rows(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                                  float factor, float* to, std::int64_t to_stride, std::int64_t& r) {
  using Way = Interleave<Groups>;
  constexpr int height = 4 * Groups;
  const auto put = [&](std::int64_t c, auto column) PIDIFF_LAMBDA_INLINE {
    if constexpr (Scaled) column *= factor;
    store<height>(to + c * to_stride + r, column);
  };
  for (; r + height <= rows; r += height) {
    const float* line = from + r * from_stride;
    std::int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      const auto a = load_groups<Groups>(line + c, from_stride);
      const auto b = load_groups<Groups>(line + from_stride + c, from_stride);
      const auto d = load_groups<Groups>(line + 2 * from_stride + c, from_stride);
      const auto e = load_groups<Groups>(line + 3 * from_stride + c, from_stride);
      const auto low_ab = Way::Low::of(a, b), high_ab = Way::High::of(a, b);
      const auto low_de = Way::Low::of(d, e), high_de = Way::High::of(d, e);
      put(c, Way::LowPair::of(low_ab, low_de));
      put(c + 1, Way::HighPair::of(low_ab, low_de));
      put(c + 2, Way::LowPair::of(high_ab, high_de));
      put(c + 3, Way::HighPair::of(high_ab, high_de));
    }
    for (; c < columns; ++c)
      for (std::int64_t i = 0; i < height; ++i)
        to[c * to_stride + r + i] = Scaled ? line[i * from_stride + c] * factor : line[i * from_stride + c];
  }
}

// to[c * to_stride + r] = from[r * from_stride + c], times factor if Scaled, for r < rows, c < columns. (Left to itself
// the compiler takes scatter instructions, which are several times slower.)
template <bool Scaled = false>
PIDIFF_INLINE void transpose(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                             float* to, std::int64_t to_stride, float factor = 1.0f) {
  std::int64_t r = 0;
  if constexpr (kLanes >= 16) transpose_rows<Scaled, 4>(from, from_stride, rows, columns, factor, to, to_stride, r);
  if constexpr (kLanes >= 8) transpose_rows<Scaled, 2>(from, from_stride, rows, columns, factor, to, to_stride, r);
  transpose_rows<Scaled, 1>(from, from_stride, rows, columns, factor, to, to_stride, r);
  for (r = rows - rows % 4; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      to[c * to_stride + r] = Scaled ? from[r * from_stride + c] * factor : from[r * from_stride + c];
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
