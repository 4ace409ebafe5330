// The vectorised CPU version of `attention` for one instruction set (see simd.h, attention_operands.h,
// attention_cpu.h); identity_mix is in identity_mix_simd.h.
//
// Vector lanes are queries. Scores are computed transposed, [keys, lanes], so that the softmax needs no horizontal
// operation and any head dim runs without padding: both products are register tiles whose broadcast side is K or V.
// These are packed once per head, in the order in which the tiles read them: rows of a layer lie kilobytes apart, and
// every block of queries reads all of them. Keys pass in blocks with the online softmax; up to kAllKeys keys (text) are
// one block, and nothing is rescaled.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/attention_operands.h"
#include "kernels/identity_mix_simd.h"
#include "kernels/simd.h"

namespace pidiff {
namespace {

constexpr int kVectors = 3;             // vectors of a register tile
constexpr std::int64_t kKeyBlock = 64;  // keys per pass of the online softmax
constexpr std::int64_t kAllKeys = 128;  // up to here one pass
constexpr std::int64_t kQueryBlock = kVectors * kLanes;

std::int64_t key_block(const AttentionParams& p) { return p.keys <= kAllKeys ? p.keys : kKeyBlock; }

// --- packing ---------------------------------------------------------------------------------------------------------

// A block of `count` keys is K's panels, kTile keys wide, then V's panels, kTile dims wide; the last panels of each are
// narrower, as `tiles` cuts them. Nothing is padded but an odd step of a unit.
std::int64_t packed_k(const AttentionParams& p, std::int64_t count) { return count * units_of(p.head_dim); }
std::int64_t packed_size(const AttentionParams& p, std::int64_t count) {
  return packed_k(p, count) + units_of(count) * p.head_dim;
}

// One row as floats: in place, or widened into `to`.
const float* row_of(const void* base, std::int64_t at, std::int64_t d, DType dtype, float* to) {
  if (dtype == DType::float32) return static_cast<const float*>(base) + at;
  widen(static_cast<const std::uint16_t*>(base) + at, to, d);
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

// --- one block of queries --------------------------------------------------------------------------------------------

// Scratch: queries [d, lanes], sums [d, lanes], scores [block, lanes], rows of q (later of out).
std::int64_t attention_scratch(const AttentionParams& p) {
  return kQueryBlock * (2 * p.head_dim + key_block(p)) + (kQueryBlock + 1) * p.head_dim;
}

void transpose_out(const AttentionParams& p, std::int64_t offset, std::int64_t rows, std::int64_t lanes,
                   const float* from, float* wide) {
  const std::int64_t d = p.head_dim;
  if (p.dtype == DType::float32) {
    transpose(from, lanes, d, rows, static_cast<float*>(p.out) + offset, p.out_stride.token);
    return;
  }
  transpose(from, lanes, d, rows, wide, d);
  for (std::int64_t r = 0; r < rows; ++r)
    narrow(wide + r * d, static_cast<std::uint16_t*>(p.out) + offset + r * p.out_stride.token, d);
}

// scores[t][lanes] = k[t] . queries; raises `top` to the block's maximum.
template <int NV>
void scores(const float* k, const float* queries, std::int64_t count, std::int64_t units, float* to, Float (&top)[NV]) {
  constexpr std::int64_t lanes = NV * kLanes;
  tiles<kTile>(count, [&](auto tile, std::int64_t t) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    multiply_panel<MR, NV>(k + t * units, queries, lanes, units, sum);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) {
        store(to + (t + i) * lanes + j * kLanes, sum[i][j]);
        top[j] = maximum(top[j], sum[i][j]);
      }
  });
}

// In place: scores [count, lanes] -> weights [units, lanes]; adds the weights to `total`.
template <int NV>
PIDIFF_INLINE void exponentials(float* scores, std::int64_t count, const Float (&top)[NV], Float (&total)[NV]) {
  constexpr std::int64_t lanes = NV * kLanes;
  for (std::int64_t t = 0; t < count; t += kDepth)
    for (int j = 0; j < NV; ++j) {
      Float weights[kDepth] = {};
      for (int step = 0; step < kDepth; ++step)
        if (step == 0 || t + step < count) {
          weights[step] = exp2<kExponentialTerms>(load(scores + (t + step) * lanes + j * kLanes) - top[j]);
          total[j] += weights[step];
        }
      store(scores + t / kDepth * lanes + j * kLanes, unit_of(weights));
    }
}

// sums[i][lanes] = sums * keep + sum_t v[t][i] * weights[t]
template <int NV>
void accumulate(const float* v, const float* weights, std::int64_t units, std::int64_t d, bool first,
                const Float (&keep)[NV], float* sums) {
  constexpr std::int64_t lanes = NV * kLanes;
  tiles<kTile>(d, [&](auto tile, std::int64_t i0) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    if (!first)
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) sum[i][j] = load(sums + (i0 + i) * lanes + j * kLanes) * keep[j];
    multiply_panel<MR, NV>(v + i0 * units, weights, lanes, units, sum);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) store(sums + (i0 + i) * lanes + j * kLanes, sum[i][j]);
  });
}

template <int NV>
void attention_lanes(const AttentionParams& p, const float* packed, std::int64_t b, std::int64_t h, std::int64_t row0,
                     std::int64_t rows, float* scratch) {
  constexpr std::int64_t lanes = NV * kLanes;
  constexpr float log2e = 1.44269504088896340736f;
  const std::int64_t d = p.head_dim, block = key_block(p);
  float* queries = scratch;
  float* sums = queries + lanes * d;
  float* weights = sums + lanes * d;
  float* lines = weights + lanes * block;
  transpose_in<true>(p.q, b * p.q_stride.batch + row0 * p.q_stride.token + h * p.q_stride.head, p.q_stride.token, rows,
                     d, p.dtype, p.scale * log2e, lanes, lines, queries);

  Float top[NV], total[NV] = {};
  for (int j = 0; j < NV; ++j) top[j] = splat(-3.0e38f);
  for (std::int64_t t0 = 0; t0 < p.keys; t0 += block) {
    const std::int64_t count = p.keys - t0 < block ? p.keys - t0 : block;
    Float higher[NV], keep[NV];
    for (int j = 0; j < NV; ++j) higher[j] = top[j];
    scores<NV>(packed, queries, count, units_of(d), weights, higher);
    for (int j = 0; j < NV; ++j) {
      keep[j] = exp2(top[j] - higher[j]);
      top[j] = higher[j];
      total[j] *= keep[j];
    }
    exponentials<NV>(weights, count, top, total);
    accumulate<NV>(packed + packed_k(p, count), weights, units_of(count), d, t0 == 0, keep, sums);
    packed += packed_size(p, count);
  }
  for (int j = 0; j < NV; ++j) total[j] = 1.0f / total[j];
  for (std::int64_t i = 0; i < d; ++i)
    for (int j = 0; j < NV; ++j) {
      float* at = sums + i * lanes + j * kLanes;
      store(at, load(at) * total[j]);
    }
  transpose_out(p, b * p.out_stride.batch + row0 * p.out_stride.token + h * p.out_stride.head, rows, lanes, sums,
                lines);
}

void attention_rows(const AttentionParams& p, const float* packed, std::int64_t b, std::int64_t h, std::int64_t row0,
                    std::int64_t rows, float* scratch) {
  if (rows <= kLanes)
    attention_lanes<1>(p, packed, b, h, row0, rows, scratch);
  else
    attention_lanes<kVectors>(p, packed, b, h, row0, rows, scratch);
}

}  // namespace
}  // namespace pidiff

#define PIDIFF_CPU_KERNELS(name) \
  namespace pidiff { \
  extern const CpuKernels name = {kQueryBlock, kRowBlock,    kLanes,            key_block,        packed_size, \
                                  pack_scratch, attention_scratch, identity_scratch, pack_keys, attention_rows, \
                                  identity_rows}; \
  }
