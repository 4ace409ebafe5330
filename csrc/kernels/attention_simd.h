// The vectorised CPU version of `attention` for one instruction set (see simd.h, attention_operands.h,
// attention_cpu.h); identity_mix is in identity_mix_simd.h, group_norm in group_norm_simd.h, convolution in
// convolution_simd.h.
//
// Vector lanes are queries. Scores are computed transposed, [keys, lanes], so that the softmax needs no horizontal
// operation. Both products are in attention_panels.h, or, in a file that defines PIDIFF_AMX, in attention_tiles.h. K and V
// are packed once per head, in the order in which these read them: rows of a layer lie kilobytes apart, and
// every block of queries reads all of them. Keys pass in blocks with the online softmax; up to kAllKeys keys (text) are
// one block. The maximum is that of the first block, until a sum of weights reaches kFar: weights above one are as exact as
// those below, so what is higher by less needs no other maximum, no search for one, and nothing is rescaled.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/attention_operands.h"
#ifdef PIDIFF_AMX
#include "kernels/attention_tiles.h"
#else
#include "kernels/attention_panels.h"
#endif
#include "kernels/convolution_direct.h"
#include "kernels/convolution_simd.h"
#include "kernels/group_norm_simd.h"
#include "kernels/identity_mix_simd.h"
#include "kernels/simd.h"

namespace pidiff {
namespace {

constexpr std::int64_t kQueryBlock = kVectors * kLanes;
constexpr float kFar = 4294967296.0f;  // 2^32: values times weights stay far from infinity

// --- one block of queries --------------------------------------------------------------------------------------------

// Scratch: queries, sums and scores [rows, lanes], rows of q (later of out).
std::int64_t attention_scratch(const AttentionParams& p) {
  return kQueryBlock * (query_rows(p.head_dim) + sum_rows(p.head_dim) + score_rows(key_block(p))) + (kQueryBlock + 1) * p.head_dim;
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
    narrow(wide + r * d, static_cast<std::uint16_t*>(p.out) + offset + r * p.out_stride.token, d, p.dtype);
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

// Another maximum: what was summed under the last one is scaled.
template <int NV>
void rescale(const Float (&higher)[NV], std::int64_t d, Float (&top)[NV], Float (&total)[NV], float* sums) {
  for (int j = 0; j < NV; ++j) {
    const Float keep = exp2(top[j] - higher[j]);
    top[j] = higher[j];
    total[j] *= keep;
    for (std::int64_t i = 0; i < d; ++i) {
      float* at = sums + (i * NV + j) * kLanes;
      store(at, load(at) * keep);
    }
  }
}

// Weights under the maximum of earlier blocks; false, and `total` as it was, if they are too large under it.
template <int NV>
bool weights_under(const float* k, const float* queries, std::int64_t count, std::int64_t d, Float (&top)[NV],
                   float* weights, Float (&total)[NV]) {
  Float sum[NV];
  for (int j = 0; j < NV; ++j) sum[j] = total[j];
  scores<NV, false>(k, queries, count, d, weights, top);
  exponentials<NV>(weights, count, top, sum);
  for (int j = 0; j < NV; ++j)
    if (!all_below(sum[j], kFar)) return false;
  for (int j = 0; j < NV; ++j) total[j] = sum[j];
  return true;
}

template <int NV>
void attention_lanes(const AttentionParams& p, const float* packed, std::int64_t b, std::int64_t h, std::int64_t row0,
                     std::int64_t rows, float* scratch) {
  constexpr std::int64_t lanes = NV * kLanes;
  constexpr float log2e = 1.44269504088896340736f;
  const std::int64_t d = p.head_dim, block = key_block(p);
  float* queries = scratch;
  float* sums = queries + lanes * query_rows(d);
  float* weights = sums + lanes * sum_rows(d);
  float* lines = weights + lanes * score_rows(block);
  transpose_in<true>(p.q, b * p.q_stride.batch + row0 * p.q_stride.token + h * p.q_stride.head, p.q_stride.token, rows,
                     d, p.dtype, p.scale * log2e, lanes, lines, queries);
  std::memset(queries + units_of(d) * lanes, 0,
              static_cast<std::size_t>((query_rows(d) - units_of(d)) * lanes) * sizeof(float));

  [[maybe_unused]] const Products set_up;
  Float top[NV], total[NV] = {};
  for (int j = 0; j < NV; ++j) top[j] = splat(-3.0e38f);
  for (std::int64_t t0 = 0; t0 < p.keys; t0 += block) {
    const std::int64_t count = p.keys - t0 < block ? p.keys - t0 : block;
    const bool first = t0 == 0;
    if (first || !weights_under<NV>(packed, queries, count, d, top, weights, total)) {
      Float higher[NV];
      for (int j = 0; j < NV; ++j) higher[j] = top[j];
      scores<NV, true>(packed, queries, count, d, weights, higher);
      rescale<NV>(higher, first ? 0 : d, top, total, sums);  // before the first block there are no sums
      exponentials<NV>(weights, count, top, total);
    }
    accumulate<NV>(packed + packed_k(p, count), weights, count, d, first, sums);
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
                                  identity_rows, norm_sums, norm_rows, kPanel, kDepth, pack_convolution, convolution_scratch, \
                                  convolution_tiles, pack_direct, direct_scratch, direct_rows}; \
  }
