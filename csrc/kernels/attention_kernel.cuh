// softmax(scale q k^T) v on the GPU, one block of queries of one (batch, head) per thread block.
//
// half, bfloat16: tensor cores, scores and sums in registers as FlashAttention-2 has them (arXiv 2307.08691); keys and
// values pass through shared memory in tiles. Head dims are padded to the next multiple of 16 only (40 -> 48).
// float: plain arithmetic, eight lanes per query; for checking rather than for speed.
#pragma once

#include "kernels/attention.h"
#include "kernels/cuda_device.cuh"

namespace pidiff::cuda {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.44269504088896340736f;

template <class T>
PIDIFF_DEVICE const T* row_of(const void* base, const AttentionParams::Strides& stride, std::int64_t batch,
                              std::int64_t token, std::int64_t head) {
  return static_cast<const T*>(base) + batch * stride.batch + token * stride.token + head * stride.head;
}

// Rows [token, token + Rows) of K or V into shared memory [Rows][Pitch]; what is past the end is zero.
template <class T, int Rows, int D, int Pitch>
PIDIFF_DEVICE void load_tile(T* to, const void* base, const AttentionParams::Strides& stride, std::int64_t batch,
                             std::int64_t token, std::int64_t head, std::int64_t tokens, int head_dim, bool vectors) {
  if (vectors) {  // 16 bytes at a time: the host found pointers and strides aligned
    struct alignas(16) Chunk {
      T element[8];
    };
    for (int i = thread_index(); i < Rows * (D / 8); i += thread_count()) {
      const int row = i / (D / 8), column = i % (D / 8) * 8;
      Chunk chunk;
      for (int e = 0; e < 8; ++e) chunk.element[e] = from_float<T>(0.0f);
      if (token + row < tokens && column < head_dim)
        chunk = *reinterpret_cast<const Chunk*>(row_of<T>(base, stride, batch, token + row, head) + column);
      *reinterpret_cast<Chunk*>(to + row * Pitch + column) = chunk;
    }
    return;
  }
  for (int i = thread_index(); i < Rows * D; i += thread_count()) {
    const int row = i / D, column = i % D;
    const bool inside = token + row < tokens && column < head_dim;
    to[row * Pitch + column] =
        inside ? row_of<T>(base, stride, batch, token + row, head)[column] : from_float<T>(0.0f);
  }
}

// Shared memory of one block in bytes: a tile of K and one of V. Rows are 8 elements longer than needed, which spreads
// the fragments' reads over all banks.
template <int D>
constexpr int tensor_pitch = D + 8;
template <int D>
constexpr int tensor_keys = D <= 96 ? 64 : 32;
template <int D>
constexpr int tensor_shared = 2 * tensor_keys<D> * tensor_pitch<D> * 2;

// Blocks: (ceil(queries / 64), heads, batch), 128 threads: four warps of 16 queries.
template <class T, int D>
PIDIFF_KERNEL void attention_tensor(AttentionParams p, bool vectors) {
  constexpr int Keys = tensor_keys<D>, Pitch = tensor_pitch<D>;
  T* k_tile = reinterpret_cast<T*>(shared_memory());
  T* v_tile = k_tile + Keys * Pitch;
  const int lane = thread_index() % kWarp, group = lane / 4, quad = lane % 4;
  const int head_dim = static_cast<int>(p.head_dim);
  const std::int64_t head = block_y(), batch = block_z();
  const std::int64_t row0 = block_x() * 64 + thread_index() / kWarp * 16 + group;

  std::uint32_t q[D / 16][4];
  for (int kk = 0; kk < D / 16; ++kk)
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = row0 + i % 2 * 8;
      const int column = kk * 16 + i / 2 * 8 + quad * 2;
      T pair[2];
      for (int e = 0; e < 2; ++e)
        pair[e] = row < p.queries && column + e < head_dim
                      ? row_of<T>(p.q, p.q_stride, batch, row, head)[column + e]
                      : from_float<T>(0.0f);
      q[kk][i] = pack(pair[0], pair[1]);
    }

  float sum[D / 8][4];
  for (auto& tile : sum)
    for (float& value : tile) value = 0.0f;
  // Index 0: row `group` of the warp's 16; index 1: row `group + 8`.
  float top[2] = {-3.0e38f, -3.0e38f}, total[2] = {0.0f, 0.0f};
  const float factor = p.scale * kLog2e;

  for (std::int64_t t0 = 0; t0 < p.keys; t0 += Keys) {
    sync_block();  // the tile before is used up
    load_tile<T, Keys, D, Pitch>(k_tile, p.k, p.k_stride, batch, t0, head, p.keys, head_dim, vectors);
    load_tile<T, Keys, D, Pitch>(v_tile, p.v, p.v_stride, batch, t0, head, p.keys, head_dim, vectors);
    sync_block();

    float score[Keys / 8][4];
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j) {
      for (float& value : score[j]) value = 0.0f;
      const T* row = k_tile + (j * 8 + group) * Pitch + quad * 2;
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) {
        const std::uint32_t b[2] = {*reinterpret_cast<const std::uint32_t*>(row + kk * 16),
                                    *reinterpret_cast<const std::uint32_t*>(row + kk * 16 + 8)};
        multiply_add(score[j], q[kk], b, T{});
      }
    }

    float higher[2] = {top[0], top[1]};
#pragma unroll
    for (int j = 0; j < Keys / 8; ++j)
      for (int i = 0; i < 4; ++i) {
        const bool inside = t0 + j * 8 + quad * 2 + i % 2 < p.keys;
        score[j][i] = inside ? score[j][i] * factor : -3.0e38f;
        higher[i / 2] = fmaxf(higher[i / 2], score[j][i]);
      }
    for (int r = 0; r < 2; ++r) {
      higher[r] = fmaxf(higher[r], exchange_xor(higher[r], 1));
      higher[r] = fmaxf(higher[r], exchange_xor(higher[r], 2));
      const float keep = exp2f(top[r] - higher[r]);
      top[r] = higher[r];
      total[r] *= keep;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        sum[j][2 * r] *= keep;
        sum[j][2 * r + 1] *= keep;
      }
    }

#pragma unroll
    for (int kk = 0; kk < Keys / 16; ++kk) {
      // Two score tiles of [16, 8] are one `a` operand of [16, 16].
      std::uint32_t a[4];
      for (int i = 0; i < 4; ++i) {
        const float* pair = &score[2 * kk + i / 2][i % 2 * 2];
        const float low = exp2f(pair[0] - top[i % 2]), high = exp2f(pair[1] - top[i % 2]);
        total[i % 2] += low + high;
        a[i] = pack(from_float<T>(low), from_float<T>(high));
      }
      const T* row = v_tile + (kk * 16 + lane % 16) * Pitch;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        std::uint32_t b[2];
        load_transposed(b, row + j * 8);
        multiply_add(sum[j], a, b, T{});
      }
    }
  }

  for (int r = 0; r < 2; ++r) {
    total[r] += exchange_xor(total[r], 1);
    total[r] += exchange_xor(total[r], 2);
    const std::int64_t row = row0 + r * 8;
    if (row >= p.queries) continue;
    T* out = static_cast<T*>(p.out) + batch * p.out_stride.batch + row * p.out_stride.token + head * p.out_stride.head;
    const float inverse = 1.0f / total[r];
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      for (int e = 0; e < 2; ++e) {
        const int column = j * 8 + quad * 2 + e;
        if (column < head_dim) out[column] = from_float<T>(sum[j][2 * r + e] * inverse);
      }
  }
}

constexpr int kPlainKeys = 16, kPlainLanes = 8, kPlainQueries = 16;

// Blocks: (ceil(queries / 16), heads, batch), 128 threads: eight lanes per query, lane l has dims l, l + 8, ...
template <int D>
PIDIFF_KERNEL void attention_plain(AttentionParams p) {
  float* k_tile = reinterpret_cast<float*>(shared_memory());
  float* v_tile = k_tile + kPlainKeys * D;
  const int part = thread_index() % kPlainLanes, head_dim = static_cast<int>(p.head_dim);
  const std::int64_t head = block_y(), batch = block_z();
  const std::int64_t row = block_x() * kPlainQueries + thread_index() / kPlainLanes;
  const bool active = row < p.queries;

  float q[D / kPlainLanes], sum[D / kPlainLanes];
  for (int i = 0; i < D / kPlainLanes; ++i) {
    const int column = i * kPlainLanes + part;
    q[i] = active && column < head_dim
               ? row_of<float>(p.q, p.q_stride, batch, row, head)[column] * (p.scale * kLog2e)
               : 0.0f;
    sum[i] = 0.0f;
  }
  float top = -3.0e38f, total = 0.0f;
  for (std::int64_t t0 = 0; t0 < p.keys; t0 += kPlainKeys) {
    sync_block();
    load_tile<float, kPlainKeys, D, D>(k_tile, p.k, p.k_stride, batch, t0, head, p.keys, head_dim, false);
    load_tile<float, kPlainKeys, D, D>(v_tile, p.v, p.v_stride, batch, t0, head, p.keys, head_dim, false);
    sync_block();
    float score[kPlainKeys], higher = top;
#pragma unroll
    for (int t = 0; t < kPlainKeys; ++t) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < D / kPlainLanes; ++i) dot += q[i] * k_tile[t * D + i * kPlainLanes + part];
      for (int mask = 1; mask < kPlainLanes; mask *= 2) dot += exchange_xor(dot, mask);
      score[t] = t0 + t < p.keys ? dot : -3.0e38f;
      higher = fmaxf(higher, score[t]);
    }
    const float keep = exp2f(top - higher);
    top = higher;
    total *= keep;
    for (float& value : sum) value *= keep;
#pragma unroll
    for (int t = 0; t < kPlainKeys; ++t) {
      const float weight = exp2f(score[t] - top);
      total += weight;
#pragma unroll
      for (int i = 0; i < D / kPlainLanes; ++i) sum[i] += weight * v_tile[t * D + i * kPlainLanes + part];
    }
  }
  if (!active) return;
  float* out = static_cast<float*>(p.out) + batch * p.out_stride.batch + row * p.out_stride.token + head * p.out_stride.head;
  for (int i = 0; i < D / kPlainLanes; ++i) {
    const int column = i * kPlainLanes + part;
    if (column < head_dim) out[column] = sum[i] / total;
  }
}

}  // namespace pidiff::cuda
