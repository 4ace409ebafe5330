// Validation, packing and the split of a convolution into tasks; its reference.
#include "kernels/convolution.h"

#include <algorithm>
#include <cstring>

#include "kernels/attention_cpu.h"
#include "kernels/driver.h"

namespace pidiff {
namespace {

constexpr std::int64_t kMostTiles = 96;  // of a task: 1 MB of transformed inputs for 320 channels in bfloat16
constexpr std::int64_t kMostRows = 126;

// Clear loops, single-threaded.
void convolution_reference(const ConvolutionParams& p) {
  const std::int64_t height = p.height * p.stride, width = p.width * p.stride, pad = p.kernel / 2;
  const auto pixel = [&](std::int64_t b, std::int64_t y, std::int64_t x) {
    return ((b * (height / p.upsampled) + y / p.upsampled) * (width / p.upsampled) + x / p.upsampled) * p.channels;
  };
  for (std::int64_t row = 0; row < p.batch * p.height * p.width; ++row) {
    const std::int64_t b = row / (p.height * p.width), top = row / p.width % p.height * p.stride - pad, left = row % p.width * p.stride - pad;
    for (std::int64_t o = 0; o < p.out_channels; ++o) {
      const std::int64_t to = row * p.out_channels + o;
      float sum = p.bias[o] + (p.residual == nullptr ? 0.0f : element(p.residual, to, p.dtype));
      for (std::int64_t i = 0; i < p.kernel; ++i)
        for (std::int64_t j = 0; j < p.kernel; ++j) {
          if (top + i < 0 || top + i >= height || left + j < 0 || left + j >= width) continue;
          for (std::int64_t c = 0; c < p.channels; ++c)
            sum += element(p.x, pixel(b, top + i, left + j) + c, p.dtype) * p.weights[((o * p.channels + c) * p.kernel + i) * p.kernel + j];
        }
      set_element(p.out, to, sum, p.dtype);
    }
  }
}

void check_channels(std::int64_t out_channels, std::int64_t channels) {
  check(channels > 0 && channels % kConvolutionChannels == 0, "channels must be a positive multiple of 32");
  check(out_channels > 0 && out_channels % kConvolutionOutputs == 0, "out_channels must be a positive multiple of 64");
}

}  // namespace

std::array<std::int64_t, 4> packed_convolution_shape(std::int64_t out_channels, std::int64_t channels, std::int64_t kernel, bool winograd,
                                                     Implementation wanted) {
  check_channels(out_channels, channels);
  check(kernel == 3 || (kernel == 1 && !winograd), "kernel must be 3, or 1 where it is done directly");
  const Implementation implementation = resolve_rounding(wanted);
  if (implementation == Implementation::reference) return {out_channels, channels, kernel, kernel};
  const CpuKernels& kernels = require_kernels(implementation);
  const std::int64_t products = winograd ? 16 : kernel * kernel;
  return {out_channels / kernels.convolution_panel, products, channels / kernels.convolution_depth, kernels.convolution_panel};
}

void pack_convolution(const float* weight, std::int64_t out_channels, std::int64_t channels, std::int64_t kernel, bool winograd, float* packed,
                      const Parallel& pool, Implementation wanted) {
  const auto [panels, products, units, panel] = packed_convolution_shape(out_channels, channels, kernel, winograd, wanted);
  const Implementation implementation = resolve_rounding(wanted);
  if (implementation == Implementation::reference) {
    std::memcpy(packed, weight, static_cast<std::size_t>(out_channels * channels * kernel * kernel) * sizeof(float));
    return;
  }
  const CpuKernels& kernels = require_kernels(implementation);
  const std::int64_t width = panel, taps = products, size = products * units * width;
  run_tasks(pool, panels, winograd ? kernels.convolution_depth * products * width : 0, [&](std::int64_t index, float* scratch) {
    if (winograd)
      kernels.pack_convolution(weight, channels, index * width, packed + index * size, scratch);
    else
      kernels.pack_direct(weight, channels, taps, index * width, packed + index * size);
  });
}

void convolution(const ConvolutionParams& p, const Parallel& pool, int threads, Implementation wanted) {
  check_channels(p.out_channels, p.channels);
  check(p.batch >= 0 && p.height >= 0 && p.width >= 0, "batch, height and width must not be negative");
  check(p.kernel == 1 || p.kernel == 3, "kernel must be 1 or 3");
  check(p.stride == 1 || p.stride == 2, "stride must be 1 or 2");
  check(p.upsampled == 1 || p.upsampled == 2, "upsampled must be 1 or 2");
  check(p.height * p.stride % p.upsampled == 0 && p.width * p.stride % p.upsampled == 0, "height and width must be of whole pixels of x");
  check(!p.winograd || (p.kernel == 3 && p.stride == 1 && p.height % 2 == 0 && p.width % 2 == 0),
        "kernel must be 3, stride 1, height and width even by Winograd's way");
  check(p.dtype != DType::float16, "x must be float32 or bfloat16");
  const Implementation implementation = resolve_rounding(wanted);
  const std::int64_t pixels = p.batch * p.height * p.width, works = p.winograd ? pixels / 4 : pixels, most = p.winograd ? kMostTiles : kMostRows;
  if (works == 0) return;
  if (implementation == Implementation::reference) return convolution_reference(p);
  const CpuKernels& kernels = require_kernels(implementation);
  const std::int64_t at_once = std::max(threads, 1), rounds = (works + most * at_once - 1) / (most * at_once);
  const std::int64_t block = (works + rounds * at_once - 1) / (rounds * at_once);
  const auto scratch_of = p.winograd ? kernels.convolution_scratch : kernels.direct_scratch;
  const auto task = p.winograd ? kernels.convolution_tiles : kernels.direct_rows;
  run_tasks(pool, (works + block - 1) / block, scratch_of(p, block), [&](std::int64_t index, float* scratch) {
    task(p, index * block, std::min(block, works - index * block), scratch);
  });
}

}  // namespace pidiff
