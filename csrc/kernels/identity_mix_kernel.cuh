// The folded identity term with its residual add on the GPU: Rows (16, or 4 where many tokens and people would not fit
// shared memory) of one batch entry per thread block. Logits are thin (40 columns for one person of SD1.5): of 16 rows in
// half and bfloat16 tensor cores make them, the channels split over eight warps; otherwise plain arithmetic, 64 columns
// wide, the channels split over four groups of threads. The second half is bound by reading h and writing out.
#pragma once

#include "kernels/attention_kernel.cuh"

namespace pidiff::cuda {

constexpr int kMixColumns = 64, kMixGroups = 4, kMixThreads = kMixColumns * kMixGroups;
constexpr int kMixChannels = 128;  // channels of y staged at a time
constexpr int kMixTiles = 5;       // of 8 columns, that a warp sums at a time

// One load of `Width` elements.
template <class T, int Width>
struct WordOf {
  using type = T;
};
template <>
struct WordOf<Half, 2> {
  using type = std::uint32_t;
};
template <>
struct WordOf<BFloat, 2> {
  using type = std::uint32_t;
};
template <>
struct WordOf<float, 2> {
  using type = std::uint64_t;
};

PIDIFF_DEVICE std::int64_t columns_of(const IdentityMixParams& p) { return p.tokens + (p.has_null ? 1 : 0); }

// Floats of shared memory: staged y or partial sums (whichever is larger), weights of every person, mass per head.
constexpr int kMixSums = kMixThreads / kWarp * kMixTiles * 8;  // of a row, by warps
static_assert(kMixSums >= kMixGroups * kMixColumns && kMixSums >= kMixChannels, "plain arithmetic fits too");
template <int Rows>
constexpr int kMixScratch = Rows * kMixSums;

template <int Rows>
std::int64_t mix_shared_floats(const IdentityMixParams& p) {
  return kMixScratch<Rows> + Rows * (p.people * p.heads * p.columns() + p.heads);
}

// weights[row][column] = y A for one person; 16 rows. pairs: y in words of two elements.
template <class T>
PIDIFF_DEVICE void mix_logits_tensor(const IdentityMixParams& p, std::int64_t batch, std::int64_t which, std::int64_t row0,
                                     float* scratch, float* weights, std::int64_t pitch, bool pairs) {
  constexpr int Warps = kMixThreads / kWarp, Columns = kMixTiles * 8;
  const int width = static_cast<int>(p.heads * columns_of(p)), channels = static_cast<int>(p.channels);
  const T* a = static_cast<const T*>(p.a) + which * p.channels * width;
  const int lane = thread_index() % kWarp, group = lane / 4, quad = lane % 4, warp = thread_index() / kWarp;
  const T* rows[2];
  for (int r = 0; r < 2; ++r)
    rows[r] = static_cast<const T*>(p.y) + batch * p.y_stride.batch + (row0 + group + 8 * r) * p.y_stride.token;
  for (int n0 = 0; n0 < width; n0 += Columns) {
    float sum[kMixTiles][4];
    for (auto& tile : sum)
      for (float& value : tile) value = 0.0f;
#pragma unroll 2
    for (int c0 = warp * 16; c0 < channels; c0 += Warps * 16) {
      std::uint32_t y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y[i] = row0 + group + i % 2 * 8 < p.queries ? load_pair(rows[i % 2], c0 + i / 2 * 8 + quad * 2, channels, pairs) : 0u;
#pragma unroll
      for (int j = 0; j < kMixTiles; ++j) {
        const int column = n0 + j * 8 + group;
        T value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = c0 + i / 2 * 8 + quad * 2 + i % 2;
          value[i] = c < channels && column < width ? a[c * width + column] : from_float<T>(0.0f);
        }
        const std::uint32_t b[2] = {pack(value[0], value[1]), pack(value[2], value[3])};
        multiply_add(sum[j], y, b, T{});
      }
    }
    sync_block();  // what was in scratch is used up
#pragma unroll
    for (int j = 0; j < kMixTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scratch[(warp * 16 + group + i / 2 * 8) * Columns + j * 8 + quad * 2 + i % 2] = sum[j][i];
    sync_block();
    for (int i = thread_index(); i < 16 * Columns; i += kMixThreads) {
      if (n0 + i % Columns >= width) continue;
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < Warps; ++w) value += scratch[w * 16 * Columns + i];
      weights[i / Columns * pitch + n0 + i % Columns] = value;
    }
  }
  sync_block();
}

// The same in plain arithmetic.
template <class T, int Rows>
PIDIFF_DEVICE void mix_logits(const IdentityMixParams& p, std::int64_t batch, std::int64_t which, std::int64_t row0,
                              float* scratch, float* weights, std::int64_t pitch) {
  const std::int64_t width = p.heads * columns_of(p);
  const T* a = static_cast<const T*>(p.a) + which * p.channels * width;
  const int tx = thread_index() % kMixColumns, group = thread_index() / kMixColumns;
  for (std::int64_t n0 = 0; n0 < width; n0 += kMixColumns) {
    const std::int64_t column = n0 + tx;
    float sum[Rows];
    for (float& value : sum) value = 0.0f;
    for (std::int64_t c0 = 0; c0 < p.channels; c0 += kMixChannels) {
      sync_block();
      for (int i = thread_index(); i < Rows * kMixChannels; i += kMixThreads) {
        const std::int64_t row = row0 + i / kMixChannels, c = c0 + i % kMixChannels;
        const bool inside = row < p.queries && c < p.channels;
        scratch[i] =
            inside ? to_float(static_cast<const T*>(p.y)[batch * p.y_stride.batch + row * p.y_stride.token + c]) : 0.0f;
      }
      sync_block();
      const std::int64_t left = p.channels - c0;
      const int count = static_cast<int>(left < kMixChannels ? left : kMixChannels);
      if (column < width)
        for (int c = group; c < count; c += kMixGroups) {
          const float value = to_float(a[(c0 + c) * width + column]);
#pragma unroll
          for (int r = 0; r < Rows; ++r) sum[r] += scratch[r * kMixChannels + c] * value;
        }
    }
    sync_block();
    for (int r = 0; r < Rows; ++r) scratch[(group * Rows + r) * kMixColumns + tx] = sum[r];
    sync_block();
    for (int i = thread_index(); i < Rows * kMixColumns; i += kMixThreads) {
      if (n0 + i % kMixColumns >= width) continue;
      float value = 0.0f;
      for (int g = 0; g < kMixGroups; ++g) value += scratch[g * Rows * kMixColumns + i];
      weights[i / kMixColumns * pitch + n0 + i % kMixColumns] = value;
    }
  }
  sync_block();
}

// Logits -> id_scale * mask * probability, per row and head; mass[row][head] = probability on real tokens.
template <class T, int Rows>
PIDIFF_DEVICE void mix_softmax(const IdentityMixParams& p, std::int64_t batch, std::int64_t which, std::int64_t row0,
                               float* weights, std::int64_t pitch, float* mass) {
  const int heads = static_cast<int>(p.heads), columns = static_cast<int>(columns_of(p));
  for (int i = thread_index(); i < Rows * heads; i += kMixThreads) {
    const std::int64_t row = row0 + i / heads;
    if (row >= p.queries) continue;
    float* logit = weights + i / heads * pitch + i % heads * columns;
    const float weight = to_float(static_cast<const T*>(p.id_scale)[batch]) *
                         to_float(static_cast<const T*>(p.mask)[which * p.queries + row]);
    float top = logit[0], total = 0.0f, real = 0.0f;
    for (int t = 1; t < columns; ++t) top = fmaxf(top, logit[t]);
    for (int t = 0; t < columns; ++t) total += logit[t] = exp2f((logit[t] - top) * 1.44269504088896340736f);
    for (int t = 0; t < columns; ++t) {
      const float probability = logit[t] / total;
      if (t < p.tokens) real += probability;
      logit[t] = weight * probability;
    }
    mass[i] = real;
  }
  sync_block();
  for (int r = thread_index(); r < Rows; r += kMixThreads) {
    if (row0 + r >= p.queries) continue;
    float total = 0.0f;
    for (int head = 0; head < heads; ++head) total += mass[r * heads + head];
    static_cast<T*>(p.id_mass)[which * p.queries + row0 + r] = from_float<T>(p.has_null ? total / heads : 0.0f);
  }
}

// out = h + weights V of every person, `Width` channels of one head by four rows at a time.
template <class T, int Rows, int Width>
PIDIFF_DEVICE void mix_add(const IdentityMixParams& p, std::int64_t batch, std::int64_t row0, const float* weights,
                           std::int64_t pitch) {
  using Word = typename WordOf<T, Width>::type;
  const int head_dim = static_cast<int>(p.channels / p.heads), columns = static_cast<int>(columns_of(p));
  const int chunks = static_cast<int>(p.channels) / Width;
  const std::int64_t width = p.heads * columns;
  for (int i = thread_index(); i < chunks * (Rows / 4); i += kMixThreads) {
    const int c = i % chunks * Width, row = i / chunks * 4;
    const T* h = static_cast<const T*>(p.h) + batch * p.h_stride.batch + (row0 + row) * p.h_stride.token + c;
    T* out = static_cast<T*>(p.out) + batch * p.out_stride.batch + (row0 + row) * p.out_stride.token + c;
    union {
      Word word;
      T element[Width];
    } value;
    float sum[4][Width];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (row0 + row + r < p.queries) value.word = *reinterpret_cast<const Word*>(h + r * p.h_stride.token);
#pragma unroll
      for (int e = 0; e < Width; ++e) sum[r][e] = to_float(value.element[e]);
    }
    for (std::int64_t person = 0; person < p.people; ++person) {
      const T* v = static_cast<const T*>(p.v) + (batch * p.people + person) * p.tokens * p.channels + c;
      const float* weight = weights + row * pitch + person * width + c / head_dim * columns;
      for (int t = 0; t < p.tokens; ++t) {
        value.word = *reinterpret_cast<const Word*>(v + t * p.channels);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int e = 0; e < Width; ++e) sum[r][e] += weight[r * pitch + t] * to_float(value.element[e]);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int e = 0; e < Width; ++e) value.element[e] = from_float<T>(sum[r][e]);
      if (row0 + row + r < p.queries) *reinterpret_cast<Word*>(out + r * p.out_stride.token) = value.word;
    }
  }
}

// Blocks: (ceil(queries / Rows), batch), 256 threads. pairs: y, h, v and out in words of two elements of one head.
template <class T, int Rows>
PIDIFF_KERNEL void identity_mix(IdentityMixParams p, bool pairs) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float* weights = scratch + kMixScratch<Rows>;
  const std::int64_t width = p.heads * columns_of(p), pitch = p.people * width;
  float* mass = weights + Rows * pitch;
  const std::int64_t row0 = block_x() * Rows, batch = block_y();

  for (std::int64_t person = 0; person < p.people; ++person) {
    const std::int64_t which = batch * p.people + person;
    float* to = weights + person * width;
    if constexpr (sizeof(T) == 2 && Rows == 16)
      mix_logits_tensor<T>(p, batch, which, row0, scratch, to, pitch, pairs);
    else
      mix_logits<T, Rows>(p, batch, which, row0, scratch, to, pitch);
    mix_softmax<T, Rows>(p, batch, which, row0, to, pitch, mass);
  }
  sync_block();
  // Every row of y was read above, so writing over it (out may be h, and y may be h) is safe from here on.
  if (pairs) return mix_add<T, Rows, 2>(p, batch, row0, weights, pitch);
  mix_add<T, Rows, 1>(p, batch, row0, weights, pitch);
}

}  // namespace pidiff::cuda
