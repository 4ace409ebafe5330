// The vectorised CPU version of both primitives, for one instruction set (see simd.h, attention_cpu.h).
//
// attention: vector lanes are queries. Scores are computed transposed, [keys, lanes], so that the softmax needs no
// horizontal operation and any head dim runs without padding: both products are register tiles whose broadcast side
// is K (rows) or V (columns) in place. Keys pass in blocks with the online softmax; up to kAllKeys keys (text) are one
// block, and nothing is rescaled.
//
// identity_mix: the logits y A are one GEMM with vector lanes over A's columns; then lanes are channels.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/simd.h"

namespace pidiff {
namespace {

constexpr int kTile = PIDIFF_TILE;      // rows of a register tile
constexpr int kVectors = 3;             // vectors of a register tile
constexpr std::int64_t kKeyBlock = 64;  // keys per pass of the online softmax
constexpr std::int64_t kAllKeys = 128;  // up to here one pass
constexpr std::int64_t kQueryBlock = kVectors * kLanes;
constexpr std::int64_t kRowBlock = 32;

std::int64_t key_block(const AttentionParams& p) { return p.keys <= kAllKeys ? p.keys : kKeyBlock; }

// Scratch: queries [d, lanes], sums [d, lanes], scores [block, lanes]; for half also one block of rows of q (later of
// out), K and V, widened.
std::int64_t attention_scratch(const AttentionParams& p) {
  const std::int64_t block = key_block(p);
  const std::int64_t wide = p.dtype == DType::float16 ? (kQueryBlock + 2 * block) * p.head_dim : 0;
  return kQueryBlock * (2 * p.head_dim + block) + wide;
}

// q rows to [d, lanes], times `factor`; lanes without a row are zero. `wide` holds the rows widened from half.
void transpose_in(const AttentionParams& p, std::int64_t offset, std::int64_t rows, std::int64_t lanes, float factor,
                  float* wide, float* to) {
  const std::int64_t d = p.head_dim;
  if (rows < lanes) std::memset(to, 0, static_cast<std::size_t>(d * lanes) * sizeof(float));
  if (p.dtype == DType::float32) {
    transpose(static_cast<const float*>(p.q) + offset, p.q_stride.token, rows, d, factor, to, lanes);
    return;
  }
  for (std::int64_t r = 0; r < rows; ++r)
    widen(static_cast<const std::uint16_t*>(p.q) + offset + r * p.q_stride.token, wide + r * d, d);
  transpose(wide, d, rows, d, factor, to, lanes);
}

void transpose_out(const AttentionParams& p, std::int64_t offset, std::int64_t rows, std::int64_t lanes,
                   const float* from, float* wide) {
  const std::int64_t d = p.head_dim;
  if (p.dtype == DType::float32) {
    transpose(from, lanes, d, rows, 1.0f, static_cast<float*>(p.out) + offset, p.out_stride.token);
    return;
  }
  transpose(from, lanes, d, rows, 1.0f, wide, d);
  for (std::int64_t r = 0; r < rows; ++r)
    narrow(wide + r * d, static_cast<std::uint16_t*>(p.out) + offset + r * p.out_stride.token, d);
}

struct Block {
  const float* data;
  std::int64_t stride;
};

// Rows [first, first + count) of K or V as floats: in place, or widened into `to`.
Block block_of(const void* base, std::int64_t offset, std::int64_t stride, std::int64_t count, std::int64_t d,
               DType dtype, float* to) {
  if (dtype == DType::float32) return {static_cast<const float*>(base) + offset, stride};
  for (std::int64_t t = 0; t < count; ++t)
    widen(static_cast<const std::uint16_t*>(base) + offset + t * stride, to + t * d, d);
  return {to, d};
}

// scores[t][lanes] = k[t] . queries; returns nothing, raises `top` to the block's maximum.
template <int NV>
void scores(Block k, const float* queries, std::int64_t count, std::int64_t d, float* to, Float (&top)[NV]) {
  constexpr std::int64_t lanes = NV * kLanes;
  tiles<kTile>(count, [&](auto tile, std::int64_t t) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    multiply<MR, NV, false>(k.data + t * k.stride, k.stride, queries, lanes, d, sum);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) {
        store(to + (t + i) * lanes + j * kLanes, sum[i][j]);
        top[j] = maximum(top[j], sum[i][j]);
      }
  });
}

// sums[i][lanes] = sums * keep + sum_t v[t][i] * weights[t]
template <int NV>
void accumulate(Block v, const float* weights, std::int64_t count, std::int64_t d, bool first, const Float (&keep)[NV],
                float* sums) {
  constexpr std::int64_t lanes = NV * kLanes;
  tiles<kTile>(d, [&](auto tile, std::int64_t i0) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    if (!first)
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NV; ++j) sum[i][j] = load(sums + (i0 + i) * lanes + j * kLanes) * keep[j];
    multiply<MR, NV, true>(v.data + i0, v.stride, weights, lanes, count, sum);
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < NV; ++j) store(sums + (i0 + i) * lanes + j * kLanes, sum[i][j]);
  });
}

template <int NV>
void attention_lanes(const AttentionParams& p, std::int64_t b, std::int64_t h, std::int64_t row0, std::int64_t rows,
                     float* scratch) {
  constexpr std::int64_t lanes = NV * kLanes;
  constexpr float log2e = 1.44269504088896340736f;
  const std::int64_t d = p.head_dim, block = key_block(p);
  float* queries = scratch;
  float* sums = queries + lanes * d;
  float* weights = sums + lanes * d;
  float* wide_rows = weights + lanes * block;
  float* wide_k = wide_rows + lanes * d;
  float* wide_v = wide_k + block * d;
  transpose_in(p, b * p.q_stride.batch + row0 * p.q_stride.token + h * p.q_stride.head, rows, lanes, p.scale * log2e,
               wide_rows, queries);

  Float top[NV], total[NV] = {};
  for (int j = 0; j < NV; ++j) top[j] = splat(-3.0e38f);
  for (std::int64_t t0 = 0; t0 < p.keys; t0 += block) {
    const std::int64_t count = p.keys - t0 < block ? p.keys - t0 : block;
    const Block k = block_of(p.k, b * p.k_stride.batch + t0 * p.k_stride.token + h * p.k_stride.head, p.k_stride.token,
                             count, d, p.dtype, wide_k);
    const Block v = block_of(p.v, b * p.v_stride.batch + t0 * p.v_stride.token + h * p.v_stride.head, p.v_stride.token,
                             count, d, p.dtype, wide_v);
    Float higher[NV], keep[NV];
    for (int j = 0; j < NV; ++j) higher[j] = top[j];
    scores<NV>(k, queries, count, d, weights, higher);
    for (int j = 0; j < NV; ++j) {
      keep[j] = exp2(top[j] - higher[j]);
      top[j] = higher[j];
      total[j] *= keep[j];
    }
    for (std::int64_t t = 0; t < count; ++t)
      for (int j = 0; j < NV; ++j) {
        float* at = weights + t * lanes + j * kLanes;
        const Float weight = exp2(load(at) - top[j]);
        total[j] += weight;
        store(at, weight);
      }
    accumulate<NV>(v, weights, count, d, t0 == 0, keep, sums);
  }
  for (int j = 0; j < NV; ++j) total[j] = 1.0f / total[j];
  for (std::int64_t i = 0; i < d; ++i)
    for (int j = 0; j < NV; ++j) {
      float* at = sums + i * lanes + j * kLanes;
      store(at, load(at) * total[j]);
    }
  transpose_out(p, b * p.out_stride.batch + row0 * p.out_stride.token + h * p.out_stride.head, rows, lanes, sums,
                wide_rows);
}

void attention_rows(const AttentionParams& p, std::int64_t b, std::int64_t h, std::int64_t row0, std::int64_t rows,
                    float* scratch) {
  if (rows <= kLanes)
    attention_lanes<1>(p, b, h, row0, rows, scratch);
  else
    attention_lanes<kVectors>(p, b, h, row0, rows, scratch);
}

// --- identity_mix ----------------------------------------------------------------------------------------------------

// Scratch: y widened [rows, channels], weights [rows, people, padded], one row of the output.
std::int64_t identity_scratch(const IdentityMixParams& p, std::int64_t padded) {
  const std::int64_t wide = p.dtype == DType::float16 ? kRowBlock * p.channels : 0;
  return wide + kRowBlock * (p.people > 0 ? p.people : 1) * padded + p.channels + 2 * p.heads + kLanes;
}

// logits[row][padded] = y A, in panels of up to kVectors vectors.
template <int NV>
void logits_panel(const float* y, std::int64_t stride, const float* a, std::int64_t padded, std::int64_t rows,
                  std::int64_t channels, float* to, std::int64_t to_stride) {
  tiles<kTile>(rows, [&](auto tile, std::int64_t r) PIDIFF_LAMBDA_INLINE {
    constexpr int MR = decltype(tile)::value;
    Float sum[MR][NV] = {};
    multiply<MR, NV, false>(y + r * stride, stride, a, padded, channels, sum);
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

// One row of logits, column t * heads + head, base 2 -> weight * softmax over t. Returns the mass on real tokens,
// averaged over heads. `top` and `total` hold one float per head.
float softmax_heads(const IdentityMixParams& p, std::int64_t padded, float weight, float* values, float* top,
                    float* total) {
  const std::int64_t heads = p.heads, columns = p.columns();
  for (std::int64_t i = 0; i < heads; ++i) top[i] = values[i];
  for (std::int64_t t = 1; t < columns; ++t)
    for (std::int64_t i = 0; i < heads; ++i) {
      const float value = values[t * heads + i];
      top[i] = top[i] > value ? top[i] : value;
    }
  for (std::int64_t t = 0; t < columns; ++t)
    for (std::int64_t i = 0; i < heads; ++i) values[t * heads + i] -= top[i];
  for (std::int64_t j = 0; j < padded; j += kLanes) store(values + j, exp2(load(values + j)));
  for (std::int64_t i = 0; i < heads; ++i) total[i] = 0.0f;
  for (std::int64_t t = 0; t < columns; ++t)
    for (std::int64_t i = 0; i < heads; ++i) total[i] += values[t * heads + i];
  for (std::int64_t i = 0; i < heads; ++i) total[i] = 1.0f / total[i];
  float mass = 0.0f;
  for (std::int64_t t = 0; t < p.tokens; ++t)
    for (std::int64_t i = 0; i < heads; ++i) {
      const float probability = values[t * heads + i] * total[i];
      mass += probability;
      values[t * heads + i] = weight * probability;
    }
  return mass / static_cast<float>(heads);
}

// to[c] = from[c] + sum_{p,t} weights[p][t * heads + head] * v[p][t][c] for c in one head, Lanes channels at a time.
template <int Lanes>
PIDIFF_INLINE void add_values(const IdentityMixParams& p, const PackedIdentity& packed, std::int64_t batch,
                              std::int64_t head, const float* weights, const float* from, float* to, std::int64_t& c,
                              std::int64_t end) {
  for (; c + Lanes <= end; c += Lanes) {
    auto sum = load<Lanes>(from + c);
    for (std::int64_t person = 0; person < p.people; ++person) {
      const float* v = packed.v + (batch * p.people + person) * p.tokens * p.channels + c;
      const float* w = weights + person * packed.padded + head;
      for (std::int64_t t = 0; t < p.tokens; ++t) sum += w[t * p.heads] * load<Lanes>(v + t * p.channels);
    }
    store<Lanes>(to + c, sum);
  }
}

void identity_rows(const IdentityMixParams& p, const PackedIdentity& packed, std::int64_t b, std::int64_t row0,
                   std::int64_t rows, float* scratch) {
  const bool half = p.dtype == DType::float16;
  const std::int64_t channels = p.channels, padded = packed.padded, people = p.people, d = p.head_dim();
  float* wide = scratch;
  float* weights = wide + (half ? kRowBlock * channels : 0);
  float* line = weights + kRowBlock * (people > 0 ? people : 1) * padded;
  float* per_head = line + channels;

  const auto scalar = [&](const void* base, std::int64_t i) {
    return half ? half_to_float(static_cast<const std::uint16_t*>(base)[i]) : static_cast<const float*>(base)[i];
  };
  const Block y = block_of(p.y, b * p.y_stride.batch + row0 * p.y_stride.token, p.y_stride.token, rows, channels,
                           p.dtype, wide);
  for (std::int64_t person = 0; person < people; ++person) {
    const std::int64_t which = b * people + person;
    float* first = weights + person * padded;
    logits(y.data, y.stride, packed.a + which * channels * padded, padded, rows, channels, first, people * padded);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = which * p.queries + row0 + r;
      const float weight = scalar(p.id_scale, b) * scalar(p.mask, at);
      const float mass =
          softmax_heads(p, padded, weight, first + r * people * padded, per_head, per_head + p.heads);
      const float shown = p.has_null ? mass : 0.0f;
      if (half)
        static_cast<std::uint16_t*>(p.id_mass)[at] = float_to_half(shown);
      else
        static_cast<float*>(p.id_mass)[at] = shown;
    }
  }
  // Only now is anything written to `out`, which may be h (and y): these rows belong to this task alone.
  for (std::int64_t r = 0; r < rows; ++r) {
    const Block h = block_of(p.h, b * p.h_stride.batch + (row0 + r) * p.h_stride.token, 0, 1, channels, p.dtype, line);
    const std::int64_t at = b * p.out_stride.batch + (row0 + r) * p.out_stride.token;
    float* to = half ? line : static_cast<float*>(p.out) + at;
    const float* row = weights + r * people * padded;
    for (std::int64_t head = 0; head < p.heads; ++head) {
      std::int64_t c = head * d;
      const std::int64_t end = c + d;
      add_values<kLanes>(p, packed, b, head, row, h.data, to, c, end);
      if constexpr (kLanes > 8) add_values<8>(p, packed, b, head, row, h.data, to, c, end);
      if constexpr (kLanes > 4) add_values<4>(p, packed, b, head, row, h.data, to, c, end);
      add_values<1>(p, packed, b, head, row, h.data, to, c, end);
    }
    if (half) narrow(line, static_cast<std::uint16_t*>(p.out) + at, channels);
  }
}

}  // namespace
}  // namespace pidiff

#define PIDIFF_CPU_KERNELS(name)                                                                       \
  namespace pidiff {                                                                                   \
  extern const CpuKernels name = {kQueryBlock,       kRowBlock,      kLanes,        attention_scratch, \
                                  identity_scratch,  attention_rows, identity_rows};                   \
  }
