// softmax(scale q k^T) v on the GPU, one block of queries of one (batch, head) per thread block.
//
// half, bfloat16: tensor cores, scores and sums in registers as FlashAttention-2 has them (arXiv 2307.08691); keys and
// values pass through shared memory in tiles, the next of which is copied while one is used. Head dims are padded to the next
// multiple of 16 in q k^T (40 -> 48), of 8 in what follows.
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

// Rows [token, token + Rows) of K or V into shared memory [Rows][Pitch], `Columns` of each; what is past the end is zero.
// There after `wait_copies` and a barrier.
template <class T, int Rows, int Columns, int Pitch>
PIDIFF_DEVICE void load_tile(T* to, const void* base, const AttentionParams::Strides& stride, std::int64_t batch,
                             std::int64_t token, std::int64_t head, std::int64_t tokens, int head_dim, bool vectors) {
  if (vectors) {  // 16 bytes at a time: the host found pointers and strides aligned
    for (int i = thread_index(); i < Rows * (Columns / 8); i += thread_count()) {
      const int row = i / (Columns / 8), column = i % (Columns / 8) * 8;
      const bool inside = token + row < tokens && column < head_dim;
      copy_async(to + row * Pitch + column, inside ? row_of<T>(base, stride, batch, token + row, head) + column : base, inside);
    }
    return;
  }
  for (int i = thread_index(); i < Rows * Columns; i += thread_count()) {
    const int row = i / Columns, column = i % Columns;
    const bool inside = token + row < tokens && column < head_dim;
    to[row * Pitch + column] =
        inside ? row_of<T>(base, stride, batch, token + row, head)[column] : from_float<T>(0.0f);
  }
}

// Two neighbouring elements of a row, zero past the end; `pairs`: they lie in one aligned word.
template <class T>
PIDIFF_DEVICE std::uint32_t load_pair(const T* row, int column, int head_dim, bool pairs) {
  if (pairs) return column < head_dim ? *reinterpret_cast<const std::uint32_t*>(row + column) : 0u;
  T pair[2];
  for (int e = 0; e < 2; ++e) pair[e] = column + e < head_dim ? row[column + e] : from_float<T>(0.0f);
  return pack(pair[0], pair[1]);
}

// Head dims of the `Dim` dims that a kernel is made for (a multiple of 8), as q k^T takes them: 16 at a time.
template <int Dim>
constexpr int tensor_dims = (Dim + 15) / 16 * 16;
// Shared memory of one block in bytes: two tiles of K and two of V, one being filled while the other is used. Rows are 8 elements
// longer than needed, which spreads the reads of eight rows over all banks.
template <int Dim>
constexpr int tensor_pitch = tensor_dims<Dim> + 8;
// Keys of a tile and warps of a block: what was fastest on an H200 at the sizes of Stable Diffusion. A tile ends in a barrier.
template <int Dim>
constexpr int tensor_keys = Dim <= 40 ? 128 : 64;
template <int Dim>
constexpr int tensor_warps = Dim == 80 ? 8 : 4;
template <int Dim>
constexpr int tensor_shared = 4 * tensor_keys<Dim> * tensor_pitch<Dim> * 2;
// Queries of a block: its warps take `Tiles` times 16 each.
template <int Dim, int Tiles>
constexpr int tensor_queries = 16 * tensor_warps<Dim> * Tiles;

// Blocks: (ceil(queries / tensor_queries), heads, batch), of tensor_warps. vectors, pairs: K and V in aligned chunks of 16 bytes, q
// and out in words of two elements.
template <class T, int Dim, int Tiles>
PIDIFF_KERNEL void attention_tensor(AttentionParams p, bool vectors, bool pairs) {
  constexpr int Keys = tensor_keys<Dim>, Pitch = tensor_pitch<Dim>, Dims = tensor_dims<Dim>, Stage = 2 * Keys * Pitch;
  constexpr int Outs = Dim / 8;
  T* const shared = reinterpret_cast<T*>(shared_memory());
  const int lane = thread_index() % kWarp, group = lane / 4, quad = lane % 4;
  const int head_dim = static_cast<int>(p.head_dim);
  const std::int64_t head = block_y(), batch = block_z();
  const std::int64_t row0 = (block_x() * tensor_warps<Dim> + thread_index() / kWarp) * (16 * Tiles) + group;

  const auto fetch = [&](std::int64_t token, int stage) {
    T* to = shared + stage * Stage;
    load_tile<T, Keys, Dims, Pitch>(to, p.k, p.k_stride, batch, token, head, p.keys, head_dim, vectors);
    load_tile<T, Keys, Dim, Pitch>(to + Keys * Pitch, p.v, p.v_stride, batch, token, head, p.keys, head_dim, vectors);
  };
  fetch(0, 0);

  std::uint32_t q[Tiles][Dims / 16][4];
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int kk = 0; kk < Dims / 16; ++kk)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t row = row0 + t * 16 + i % 2 * 8;
        q[t][kk][i] = row < p.queries ? load_pair(row_of<T>(p.q, p.q_stride, batch, row, head),
                                                  kk * 16 + i / 2 * 8 + quad * 2, head_dim, pairs)
                                      : 0u;
      }

  float sum[Tiles][Outs][4], top[Tiles][2], total[Tiles][2];
#pragma unroll
  for (int t = 0; t < Tiles; ++t) {
    for (auto& tile : sum[t])
      for (float& value : tile) value = 0.0f;
    // Index 0: row `group` of 16; index 1: row `group + 8`.
#pragma unroll
    for (int r = 0; r < 2; ++r) top[t][r] = -3.0e38f, total[t][r] = 0.0f;
  }
  const float factor = p.scale * kLog2e;

  int stage = 0;
  for (std::int64_t t0 = 0; t0 < p.keys; t0 += Keys, stage ^= 1) {
    wait_copies();
    sync_block();  // this tile is there, and the one before is used up
    if (t0 + Keys < p.keys) fetch(t0 + Keys, stage ^ 1);
    const T* k_tile = shared + stage * Stage;
    const T* v_tile = k_tile + Keys * Pitch;

    float score[Tiles][Keys / 8][4];
#pragma unroll
    for (int j = 0; j < Keys / 8; j += 2) {
#pragma unroll
      for (int t = 0; t < Tiles; ++t)
#pragma unroll
        for (int i = 0; i < 8; ++i) score[t][j + i / 4][i % 4] = 0.0f;
#pragma unroll
      for (int kk = 0; kk < Dims / 16; ++kk) {
        std::uint32_t b[2][2];  // of 16 keys
        load_matrices(b, k_tile + (j * 8 + lane / 16 * 8 + lane % 8) * Pitch + kk * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          multiply_add(score[t][j], q[t][kk], b[0], T{});
          multiply_add(score[t][j + 1], q[t][kk], b[1], T{});
        }
      }
    }
    if (t0 + Keys > p.keys)
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (t0 + j * 8 + quad * 2 + i % 2 >= p.keys)
#pragma unroll
            for (int t = 0; t < Tiles; ++t) score[t][j][i] = -3.0e38f;

    float highest[Tiles][2];  // times factor
#pragma unroll
    for (int t = 0; t < Tiles; ++t)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float higher = top[t][r];
#pragma unroll
        for (int j = 0; j < Keys / 8; ++j) higher = fmaxf(higher, fmaxf(score[t][j][2 * r], score[t][j][2 * r + 1]));
        higher = fmaxf(higher, exchange_xor(higher, 1));
        higher = fmaxf(higher, exchange_xor(higher, 2));
        const float keep = exp2_fast((top[t][r] - higher) * factor);
        top[t][r] = higher;
        highest[t][r] = higher * factor;
        total[t][r] *= keep;
#pragma unroll
        for (int j = 0; j < Outs; ++j) {
          sum[t][j][2 * r] *= keep;
          sum[t][j][2 * r + 1] *= keep;
        }
      }

#pragma unroll
    for (int kk = 0; kk < Keys / 16; ++kk) {
      // Two score tiles of [16, 8] are one `a` operand of [16, 16].
      std::uint32_t a[Tiles][4];
#pragma unroll
      for (int t = 0; t < Tiles; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &score[t][2 * kk + i / 2][i % 2 * 2];
          const float low = exp2_fast(fmaf(pair[0], factor, -highest[t][i % 2]));
          const float high = exp2_fast(fmaf(pair[1], factor, -highest[t][i % 2]));
          total[t][i % 2] += low + high;
          a[t][i] = pack_floats<T>(low, high);
        }
      const T* row = v_tile + (kk * 16 + lane % 16) * Pitch;
#pragma unroll
      for (int j = 0; j + 1 < Outs; j += 2) {
        std::uint32_t b[2][2];  // of 16 dims
        load_transposed(b, row + (j + lane / 16) * 8);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
          multiply_add(sum[t][j], a[t], b[0], T{});
          multiply_add(sum[t][j + 1], a[t], b[1], T{});
        }
      }
      if constexpr (Outs % 2 == 1) {
        std::uint32_t b[2];
        load_transposed(b, row + (Outs - 1) * 8);
#pragma unroll
        for (int t = 0; t < Tiles; ++t) multiply_add(sum[t][Outs - 1], a[t], b, T{});
      }
    }
  }

#pragma unroll
  for (int t = 0; t < Tiles; ++t)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[t][r] += exchange_xor(total[t][r], 1);
      total[t][r] += exchange_xor(total[t][r], 2);
      const std::int64_t row = row0 + t * 16 + r * 8;
      if (row >= p.queries) continue;
      T* out = static_cast<T*>(p.out) + batch * p.out_stride.batch + row * p.out_stride.token + head * p.out_stride.head;
      const float inverse = 1.0f / total[t][r];
#pragma unroll
      for (int j = 0; j < Outs; ++j) {
        const int column = j * 8 + quad * 2;
        const float* pair = &sum[t][j][2 * r];
        if (pairs) {
          if (column < head_dim) *reinterpret_cast<std::uint32_t*>(out + column) = pack_floats<T>(pair[0] * inverse, pair[1] * inverse);
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (column + e < head_dim) out[column + e] = from_float<T>(pair[e] * inverse);
        }
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
