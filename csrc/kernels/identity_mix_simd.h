// identity_mix for one instruction set: the logits y A are one GEMM with vector lanes over A's columns; then lanes are
// channels. Included by attention_simd.h.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/simd.h"

namespace pidiff {
namespace {

constexpr std::int64_t kRowBlock = 32;

// A register tile: sum[i][j] += a[i * lda + k] * b[k][j] for k < depth, where b's rows are NV vectors, `ldb` apart.
template <int MR, int NV>
PIDIFF_INLINE void multiply(const float* a, std::int64_t lda, const float* b, std::int64_t ldb, std::int64_t depth,
                            Float (&sum)[MR][NV]) {
  for (std::int64_t k = 0; k < depth; ++k) {
    Float row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) sum[i][j] += a[i * lda + k] * row[j];
  }
}

struct Block {
  const float* data;
  std::int64_t stride;
};

// `count` rows as floats: in place, or widened into `to`.
Block block_of(const void* base, std::int64_t offset, std::int64_t stride, std::int64_t count, std::int64_t d,
               DType dtype, float* to) {
  if (dtype == DType::float32) return {static_cast<const float*>(base) + offset, stride};
  for (std::int64_t t = 0; t < count; ++t)
    widen(static_cast<const std::uint16_t*>(base) + offset + t * stride, to + t * d, d, dtype);
  return {to, d};
}

// Scratch: y widened [rows, channels], weights [rows, people, padded], one row of the output.
std::int64_t identity_scratch(const IdentityMixParams& p, std::int64_t padded) {
  const std::int64_t wide = p.dtype != DType::float32 ? kRowBlock * p.channels : 0;
  return wide + kRowBlock * (p.people > 0 ? p.people : 1) * padded + p.channels + kLanes;
}

// logits[row][padded] = y A, in panels of up to kVectors vectors.
template <int NV>
void logits_panel(const float* y, std::int64_t stride, const float* a, std::int64_t padded, std::int64_t rows,
                  std::int64_t channels, float* to, std::int64_t to_stride) {
  tiles<kTile>(rows, [&](auto tile, std::int64_t r) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    multiply<MR, NV>(y + r * stride, stride, a, padded, channels, sum);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) store(to + (r + i) * to_stride + j * kLanes, sum[i][j]);
  });
}

void logits(const float* y, std::int64_t stride, const float* a, std::int64_t padded, std::int64_t rows,
            std::int64_t channels, float* to, std::int64_t to_stride) {
  std::int64_t column = 0;
  for (; column + 3 * kLanes <= padded; column += 3 * kLanes)
    logits_panel<3>(y, stride, a + column, padded, rows, channels, to + column, to_stride);
  if (column + 2 * kLanes <= padded) {
    logits_panel<2>(y, stride, a + column, padded, rows, channels, to + column, to_stride);
    column += 2 * kLanes;
  }
  if (column < padded) logits_panel<1>(y, stride, a + column, padded, rows, channels, to + column, to_stride);
}

// One row of logits, column t * heads + head, Lanes heads of it: subtracts their maximum.
template <int Lanes>
PIDIFF_INLINE void subtract_top(float* values, std::int64_t heads, std::int64_t columns) {
  auto top = load<Lanes>(values);
  for (std::int64_t t = 1; t < columns; ++t) {
    const auto value = load<Lanes>(values + t * heads);
    top = top > value ? top : value;
  }
  for (std::int64_t t = 0; t < columns; ++t) store<Lanes>(values + t * heads, load<Lanes>(values + t * heads) - top);
}

// The same columns after the exponential: to probabilities.
template <int Lanes>
PIDIFF_INLINE void divide_by_total(float* values, std::int64_t heads, std::int64_t columns) {
  typename Vector<Lanes>::Float total = {};
  for (std::int64_t t = 0; t < columns; ++t) total += load<Lanes>(values + t * heads);
  total = 1.0f / total;
  for (std::int64_t t = 0; t < columns; ++t) store<Lanes>(values + t * heads, load<Lanes>(values + t * heads) * total);
}

// One row of logits, base 2 -> weight * softmax over t. Returns the mass on real tokens, averaged over heads.
float softmax_heads(const IdentityMixParams& p, std::int64_t padded, float weight, float* values) {
  const std::int64_t heads = p.heads, columns = p.columns(), fours = heads / 4 * 4;
  for (std::int64_t i = 0; i < fours; i += 4) subtract_top<4>(values + i, heads, columns);
  for (std::int64_t i = fours; i < heads; ++i) subtract_top<1>(values + i, heads, columns);
  for (std::int64_t j = 0; j < padded; j += kLanes) store(values + j, exp2(load(values + j)));
  for (std::int64_t i = 0; i < fours; i += 4) divide_by_total<4>(values + i, heads, columns);
  for (std::int64_t i = fours; i < heads; ++i) divide_by_total<1>(values + i, heads, columns);
  float mass = 0.0f;
  const std::int64_t real = p.tokens * heads;
  for (std::int64_t j = 0; j < real; ++j) mass += values[j];
  for (std::int64_t j = 0; j < real; ++j) values[j] *= weight;
  return mass / static_cast<float>(heads);
}

// to[c] = from[c] + sum_{p,t} weights[p][t * heads + head] * v[p][t][c] for c in one head, NV vectors of Lanes channels
// at a time: independent sums, since each waits for its last multiply-add.
template <int Lanes, int NV>
PIDIFF_INLINE void add_values(const IdentityMixParams& p, const PackedIdentity& packed, std::int64_t batch,
                              std::int64_t head, const float* weights, const float* from, float* to, std::int64_t& c,
                              std::int64_t end) {
  for (; c + NV * Lanes <= end; c += NV * Lanes) {
    typename Vector<Lanes>::Float sum[NV];
    for (int j = 0; j < NV; ++j) sum[j] = load<Lanes>(from + c + j * Lanes);
    for (std::int64_t person = 0; person < p.people; ++person) {
      const float* v = packed.v + (batch * p.people + person) * p.tokens * p.channels + c;
      const float* w = weights + person * packed.padded + head;
      for (std::int64_t t = 0; t < p.tokens; ++t)
        for (int j = 0; j < NV; ++j) sum[j] += w[t * p.heads] * load<Lanes>(v + t * p.channels + j * Lanes);
    }
    for (int j = 0; j < NV; ++j) store<Lanes>(to + c + j * Lanes, sum[j]);
  }
}

void identity_rows(const IdentityMixParams& p, const PackedIdentity& packed, std::int64_t b, std::int64_t row0,
                   std::int64_t rows, float* scratch) {
  const bool narrower = p.dtype != DType::float32;
  const std::int64_t channels = p.channels, padded = packed.padded, people = p.people, d = p.head_dim();
  float* wide = scratch;
  float* weights = wide + (narrower ? kRowBlock * channels : 0);
  float* line = weights + kRowBlock * (people > 0 ? people : 1) * padded;

  const Block y = block_of(p.y, b * p.y_stride.batch + row0 * p.y_stride.token, p.y_stride.token, rows, channels,
                           p.dtype, wide);
  for (std::int64_t person = 0; person < people; ++person) {
    const std::int64_t which = b * people + person;
    float* first = weights + person * padded;
    logits(y.data, y.stride, packed.a + which * channels * padded, padded, rows, channels, first, people * padded);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = which * p.queries + row0 + r;
      const float weight = element(p.id_scale, b, p.dtype) * element(p.mask, at, p.dtype);
      const float mass = softmax_heads(p, padded, weight, first + r * people * padded);
      set_element(p.id_mass, at, p.has_null ? mass : 0.0f, p.dtype);
    }
  }
  // Only now is anything written to `out`, which may be h (and y): these rows belong to this task alone.
  for (std::int64_t r = 0; r < rows; ++r) {
    const Block h = block_of(p.h, b * p.h_stride.batch + (row0 + r) * p.h_stride.token, 0, 1, channels, p.dtype, line);
    const std::int64_t at = b * p.out_stride.batch + (row0 + r) * p.out_stride.token;
    float* to = narrower ? line : static_cast<float*>(p.out) + at;
    const float* row = weights + r * people * padded;
    for (std::int64_t head = 0; head < p.heads; ++head) {
      std::int64_t c = head * d;
      const std::int64_t end = c + d;
      add_values<kLanes, 4>(p, packed, b, head, row, h.data, to, c, end);
      add_values<kLanes, 2>(p, packed, b, head, row, h.data, to, c, end);
      add_values<kLanes, 1>(p, packed, b, head, row, h.data, to, c, end);
      if constexpr (kLanes > 8) add_values<8, 1>(p, packed, b, head, row, h.data, to, c, end);
      if constexpr (kLanes > 4) add_values<4, 1>(p, packed, b, head, row, h.data, to, c, end);
      add_values<1, 1>(p, packed, b, head, row, h.data, to, c, end);
    }
    if (narrower) narrow(line, static_cast<std::uint16_t*>(p.out) + at, channels, p.dtype);
  }
}

}  // namespace
}  // namespace pidiff
