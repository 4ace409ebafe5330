// Both products of `attention` by register tiles of vectors whose broadcast side is K or V: any head dim runs without padding.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/attention_operands.h"

namespace pidiff {
namespace {

constexpr int kVectors = 3;             // vectors of a register tile
constexpr std::int64_t kKeyBlock = 64;  // keys per pass of the online softmax

std::int64_t key_block(const AttentionParams& p) { return p.keys <= kAllKeys ? p.keys : kKeyBlock; }

struct Products {};  // nothing to set up

// Rows of queries [units, lanes], of sums [dims, lanes] and of scores [keys, lanes], with padding.
constexpr std::int64_t query_rows(std::int64_t d) { return units_of(d); }
constexpr std::int64_t sum_rows(std::int64_t d) { return d; }
constexpr std::int64_t score_rows(std::int64_t count) { return count; }

// A block of `count` keys is K's panels, kTile keys wide, then V's panels, kTile dims wide; the last panels of each are
// narrower, as `tiles` cuts them. Nothing is padded but an odd step of a unit.
std::int64_t packed_k(const AttentionParams& p, std::int64_t count) { return count * units_of(p.head_dim); }
std::int64_t packed_size(const AttentionParams& p, std::int64_t count) {
  return packed_k(p, count) + units_of(count) * p.head_dim;
}

std::int64_t pack_scratch(const AttentionParams& p) { return (kTile + 1) * p.head_dim; }

// Heads are the inner loop, so that memory is read in order: a token's heads lie side by side.
void pack_keys(const AttentionParams& p, std::int64_t b, std::int64_t block, float* to, std::int64_t head_size,
               float* scratch) {
  const std::int64_t d = p.head_dim, first = block * key_block(p);
  const std::int64_t count = p.keys - first < key_block(p) ? p.keys - first : key_block(p);
  tiles<kTile>(count, [&](auto tile, std::int64_t t) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    const std::int64_t at = b * p.k_stride.batch + (first + t) * p.k_stride.token;
    for (std::int64_t h = 0; h < p.heads; ++h)
      transpose_in<false>(p.k, at + h * p.k_stride.head, p.k_stride.token, MR, d, p.dtype, 1.0f, MR, scratch,
                   to + h * head_size + t * units_of(d));
  });
  for (std::int64_t t = 0; t < count; t += kDepth)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t at = b * p.v_stride.batch + (first + t) * p.v_stride.token + h * p.v_stride.head;
      const float* rows[kDepth] = {};
      for (int step = 0; step < kDepth && t + step < count; ++step)
        rows[step] = row_of(p.v, at + step * p.v_stride.token, d, p.dtype, scratch + step * d);
      const float* line = column_units(rows, d, scratch + kDepth * d);
      float* values = to + h * head_size + packed_k(p, count);
      tiles<kTile>(d, [&](auto tile, std::int64_t i) PIDIFF_LAMBDA_INLINE {
        constexpr int MR = decltype(tile)::value;
        std::memcpy(values + i * units_of(count) + t / kDepth * MR, line + i, MR * sizeof(float));
      });
    }
}

// scores[t][lanes] = k[t] . queries; raises `top` to the block's maximum if Raise.
template <int NV, bool Raise>
void scores(const float* k, const float* queries, std::int64_t count, std::int64_t d, float* to, Float (&top)[NV]) {
  constexpr std::int64_t lanes = NV * kLanes;
  const std::int64_t units = units_of(d);
  tiles<kTile>(count, [&](auto tile, std::int64_t t) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    multiply_panel<MR, NV>(k + t * units, queries, lanes, units, sum);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) {
        store(to + (t + i) * lanes + j * kLanes, sum[i][j]);
        if constexpr (Raise) top[j] = maximum(top[j], sum[i][j]);
      }
  });
}

// sums[i][lanes] += sum_t v[t][i] * weights[t], from zero if `first`.
template <int NV>
void accumulate(const float* v, float* weights, std::int64_t count, std::int64_t d, bool first, float* sums) {
  constexpr std::int64_t lanes = NV * kLanes;
  const std::int64_t units = units_of(count);
  tiles<kTile>(d, [&](auto tile, std::int64_t i0) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    if (!first)
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) sum[i][j] = load(sums + (i0 + i) * lanes + j * kLanes);
    multiply_panel<MR, NV>(v + i0 * units, weights, lanes, units, sum);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) store(sums + (i0 + i) * lanes + j * kLanes, sum[i][j]);
  });
}

}  // namespace
}  // namespace pidiff
