// convolution (convolution_params.h) as one product, for one instruction set: of a linear layer and 1 x 1, of 3 x 3 where the pictures are
// small or only every second pixel is wanted. Included by attention_simd.h.
//
// Rows, a pixel of the output each, pass in blocks. What a row is a sum of is put side by side, [rows, taps, units of channels]; then, for a panel
// of outputs after the other, the product with the panel's weights, a part of the sum after the other so that both stay in the cache.
#pragma once

#include "kernels/convolution_simd.h"

namespace pidiff {
namespace {

constexpr std::int64_t kPart = 640;  // units of a sum

std::int64_t direct_scratch(const ConvolutionParams& p, std::int64_t rows) {
  return convolution_rows(rows) * (p.kernel * p.kernel * units_of(p.channels) + kPanel);
}

// Weights [out_channels, channels, taps] of one panel of outputs -> units [taps, units of channels, kPanel].
void pack_direct(const float* weight, std::int64_t channels, std::int64_t taps, std::int64_t first, float* to) {
  for (std::int64_t tap = 0; tap < taps; ++tap)
    for (std::int64_t c = 0; c < channels; c += kDepth)
      for (std::int64_t o = 0; o < kPanel; o += kLanes, to += kLanes) {
        float steps[kDepth][kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
          for (int step = 0; step < kDepth; ++step) steps[step][lane] = weight[((first + o + lane) * channels + c + step) * taps + tap];
        Float loaded[kDepth];
        for (int step = 0; step < kDepth; ++step) loaded[step] = load(steps[step]);
        store(to, unit_of(loaded));
      }
}

// A pixel's channels as units; zeros where there is none.
template <class T>
PIDIFF_INLINE void put_pixel(const T* pixel, std::int64_t channels, float* to) {
  if (pixel == nullptr)
    std::memset(to, 0, static_cast<std::size_t>(units_of(channels)) * sizeof(float));
  else if (kDepth * sizeof(T) == sizeof(float))
    std::memcpy(to, pixel, static_cast<std::size_t>(channels) * sizeof(T));
  else
    for (std::int64_t c = 0; c < channels; c += kLanes) put_steps(to, c, values(pixel + c));
}

// What output pixel `row` is a sum of.
template <class T>
void put_taps(const ConvolutionParams& p, std::int64_t row, float* to) {
  const std::int64_t height = p.height * p.stride, width = p.width * p.stride, pad = p.kernel / 2;  // of x, every pixel of it `upsampled` squared
  const std::int64_t b = row / (p.height * p.width), top = row / p.width % p.height * p.stride - pad, left = row % p.width * p.stride - pad;
  for (std::int64_t y = top; y < top + p.kernel; ++y)
    for (std::int64_t x = left; x < left + p.kernel; ++x, to += units_of(p.channels)) {
      const std::int64_t at = (b * (height / p.upsampled) + y / p.upsampled) * (width / p.upsampled) + x / p.upsampled;
      const bool inside = y >= 0 && y < height && x >= 0 && x < width;
      put_pixel(inside ? static_cast<const T*>(p.x) + at * p.channels : nullptr, p.channels, to);
    }
}

template <class T>
void convolve_directly(const ConvolutionParams& p, std::int64_t first, std::int64_t count, float* scratch) {
  const std::int64_t rows = convolution_rows(count), units = p.kernel * p.kernel * units_of(p.channels);
  float* sums = scratch + rows * units;
  for (std::int64_t r = 0; r < count; ++r) put_taps<T>(p, first + r, scratch + r * units);
  for (std::int64_t o = 0; o < p.out_channels; o += kPanel) {
    for (std::int64_t k = 0; k < units; k += kPart)
      for (std::int64_t r = 0; r < rows; r += kTileRows)  // the last ones may be nobody's
        add_rows(scratch + r * units + k, units, units - k < kPart ? units - k : kPart, p.weights + o * units + k * kPanel, k == 0,
                 sums + r * kPanel);
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t i = o; i < o + kPanel; i += kLanes)
        put_output<T>(p, (first + r) * p.out_channels + i, i, load(sums + r * kPanel + i - o));
  }
}

void direct_rows(const ConvolutionParams& p, std::int64_t first, std::int64_t count, float* scratch) {
  if (p.dtype == DType::bfloat16)
    convolve_directly<std::uint16_t>(p, first, count, scratch);
  else
    convolve_directly<float>(p, first, count, scratch);
}

}  // namespace
}  // namespace pidiff
