// The folded identity term with its residual add on the GPU: Rows (16, or 4 where many tokens and people would not fit
// shared memory) of one batch entry per thread block. Logits are thin (40 columns for one person of SD1.5), so they use
// plain arithmetic: 64 columns wide, the channels split over four groups of threads. The second half is bound by reading
// h and writing out.
#pragma once

#include "kernels/attention.h"
#include "kernels/cuda_device.cuh"

namespace pidiff::cuda {

constexpr int kMixColumns = 64, kMixGroups = 4, kMixThreads = kMixColumns * kMixGroups;
constexpr int kMixChannels = 128;  // channels of y staged at a time

PIDIFF_DEVICE std::int64_t columns_of(const IdentityMixParams& p) { return p.tokens + (p.has_null ? 1 : 0); }

// Floats of shared memory: staged y or partial sums (whichever is larger), weights of every person, mass per head.
template <int Rows>
constexpr int kMixScratch = Rows * (kMixChannels > kMixGroups * kMixColumns ? kMixChannels : kMixGroups * kMixColumns);

template <int Rows>
std::int64_t mix_shared_floats(const IdentityMixParams& p) {
  return kMixScratch<Rows> + Rows * (p.people * p.heads * p.columns() + p.heads);
}

// weights[row][column] = y A for one person.
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

// Blocks: (ceil(queries / Rows), batch), 256 threads.
template <class T, int Rows>
PIDIFF_KERNEL void identity_mix(IdentityMixParams p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float* weights = scratch + kMixScratch<Rows>;
  const std::int64_t width = p.heads * columns_of(p), pitch = p.people * width, head_dim = p.channels / p.heads;
  float* mass = weights + Rows * pitch;
  const std::int64_t row0 = block_x() * Rows, batch = block_y();

  for (std::int64_t person = 0; person < p.people; ++person) {
    const std::int64_t which = batch * p.people + person;
    mix_logits<T, Rows>(p, batch, which, row0, scratch, weights + person * width, pitch);
    mix_softmax<T, Rows>(p, batch, which, row0, weights + person * width, pitch, mass);
  }
  sync_block();
  // Every row of y was read above, so writing over it (out may be h, and y may be h) is safe from here on.
  for (std::int64_t c = thread_index(); c < p.channels; c += kMixThreads) {
    float sum[Rows];
    for (int r = 0; r < Rows; ++r) {
      const std::int64_t at = batch * p.h_stride.batch + (row0 + r) * p.h_stride.token + c;
      sum[r] = row0 + r < p.queries ? to_float(static_cast<const T*>(p.h)[at]) : 0.0f;
    }
    const std::int64_t first = c / head_dim * columns_of(p);
    for (std::int64_t person = 0; person < p.people; ++person)
      for (std::int64_t t = 0; t < p.tokens; ++t) {
        const std::int64_t at = ((batch * p.people + person) * p.tokens + t) * p.channels + c;
        const float value = to_float(static_cast<const T*>(p.v)[at]);
        const float* weight = weights + person * width + first + t;
        for (int r = 0; r < Rows; ++r)
          if (row0 + r < p.queries) sum[r] += weight[r * pitch] * value;
      }
    for (int r = 0; r < Rows; ++r)
      if (row0 + r < p.queries)
        static_cast<T*>(p.out)[batch * p.out_stride.batch + (row0 + r) * p.out_stride.token + c] = from_float<T>(sum[r]);
  }
}

}  // namespace pidiff::cuda
