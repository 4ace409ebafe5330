// What the register tiles of `attention` multiply: units of 32 bits, kDepth consecutive steps of a sum in each. A unit
// is a float, or, in a file that defines PIDIFF_BF16, a pair of bfloat16 for the dot-product instruction, which adds
// both products to a float. Units travel as floats and are only ever moved, never computed with.
#pragma once

#include "kernels/simd.h"

namespace pidiff {
namespace {

#ifdef PIDIFF_BF16
constexpr int kDepth = 2;
constexpr int kExponentialTerms = 4;

PIDIFF_INLINE Float multiply_add(Float units, float unit, Float sum) {
  return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(unit), (__m512bh)units);
}

// Lane i of the result is the pair (first[i], second[i]), rounded to nearest even.
PIDIFF_INLINE Float unit_of(const Float (&steps)[2]) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)steps[1], (__m512)steps[0]);
  return (Float)_mm512_permutexvar_epi16(order, (__m512i)halves);
}

// The elements from `i` on that a vector holds; zeros after the last.
PIDIFF_INLINE Float load_some(const float* row, std::int64_t i, std::int64_t count, float factor) {
  const std::int64_t left = count - i;
  const auto mask = static_cast<__mmask16>(left >= kLanes ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
  return (Float)_mm512_maskz_loadu_ps(mask, row + i) * factor;
}
PIDIFF_INLINE void store_some(float* to, std::int64_t i, std::int64_t count, __m512i units) {
  const std::int64_t left = count - i;
  const auto mask = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1 << left) - 1);
  _mm512_mask_storeu_epi32(to + i, mask, units);
}

// A row's neighbours in pairs, times `factor`; an odd last element stands alone.
PIDIFF_INLINE void row_units(const float* row, std::int64_t count, float factor, float* to) {
  for (std::int64_t i = 0; i < count; i += 2 * kLanes)
    store_some(to, i / 2, (count + 1) / 2,
               (__m512i)_mm512_cvtne2ps_pbh((__m512)load_some(row, i + kLanes, count, factor),
                                            (__m512)load_some(row, i, count, factor)));
}

// Two rows' elements of one column in pairs; a missing second row is zero.
PIDIFF_INLINE const float* column_units(const float* const (&rows)[2], std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const Float steps[2] = {load_some(rows[0], i, count, 1.0f),
                            rows[1] == nullptr ? Float{} : load_some(rows[1], i, count, 1.0f)};
    store_some(to, i, count, (__m512i)unit_of(steps));
  }
  return to;
}
#else
constexpr int kDepth = 1;
constexpr int kExponentialTerms = 6;

PIDIFF_INLINE Float multiply_add(Float units, float unit, Float sum) { return sum + unit * units; }

PIDIFF_INLINE Float unit_of(const Float (&steps)[1]) { return steps[0]; }

PIDIFF_INLINE void row_units(const float* row, std::int64_t count, float factor, float* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(row + i) * factor);
  for (; i < count; ++i) to[i] = row[i] * factor;
}

PIDIFF_INLINE const float* column_units(const float* const (&rows)[1], std::int64_t, float*) { return rows[0]; }
#endif

constexpr std::int64_t units_of(std::int64_t steps) { return (steps + kDepth - 1) / kDepth; }

constexpr std::int64_t kAllKeys = 128;  // up to here one pass of the softmax

// One row as floats: in place, or widened into `to`.
const float* row_of(const void* base, std::int64_t at, std::int64_t d, DType dtype, float* to) {
  if (dtype == DType::float32) return static_cast<const float*>(base) + at;
  widen(static_cast<const std::uint16_t*>(base) + at, to, d, dtype);
  return to;
}

// [rows, d] at `at` -> [units, lanes], times `factor` if Scaled; lanes without a row are zero. `lines`: (lanes + 1) * d
// floats.
template <bool Scaled>
void transpose_in(const void* base, std::int64_t at, std::int64_t stride, std::int64_t rows, std::int64_t d,
                  DType dtype, float factor, std::int64_t lanes, float* lines, float* to) {
  const std::int64_t units = units_of(d);
  if (rows < lanes) std::memset(to, 0, static_cast<std::size_t>(units * lanes) * sizeof(float));
  if (kDepth == 1 && dtype == DType::float32)
    return transpose<Scaled>(static_cast<const float*>(base) + at, stride, rows, d, to, lanes, factor);
  float* wide = lines + lanes * units;
  for (std::int64_t r = 0; r < rows; ++r)
    row_units(row_of(base, at + r * stride, d, dtype, wide), d, factor, lines + r * units);
  transpose(lines, units, rows, units, to, lanes);
}

// A register tile: sum[i][j] += a[k][i] * b[k][j] for k < units, where b's rows are NV vectors, `ldb` apart, and a's MR units: side by
// side, or if not Panel `across` apart, each row's beside those of the next k.
template <int MR, int NV, bool Panel = true>
PIDIFF_INLINE void multiply_panel(const float* a, const float* b, std::int64_t ldb, std::int64_t units, Float (&sum)[MR][NV],
                                  [[maybe_unused]] std::int64_t across = 0) {
  for (std::int64_t k = 0; k < units; ++k) {
    Float row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] = multiply_add(row[j], a[Panel ? k * MR + i : i * across + k], sum[i][j]);
  }
}

}  // namespace
}  // namespace pidiff
