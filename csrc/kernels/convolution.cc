// Validation, packing and the split of a convolution into tasks; its reference.
#include "kernels/convolution.h"

#include <algorithm>
#include <cstring>

#include "kernels/attention_cpu.h"
#include "kernels/driver.h"

namespace pidiff {
namespace {

constexpr std::int64_t kMostTiles = 96;  // of a task: 1 MB of transformed inputs for 320 channels in bfloat16

// Clear loops, single-threaded.
void convolution_reference(const ConvolutionParams& p) {
  const std::int64_t height = p.height / p.upsampled, width = p.width / p.upsampled;
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t y = 0; y < p.height; ++y)
      for (std::int64_t x = 0; x < p.width; ++x)
        for (std::int64_t o = 0; o < p.out_channels; ++o) {
          const std::int64_t to = ((b * p.height + y) * p.width + x) * p.out_channels + o;
          float sum = p.bias[o] + (p.residual == nullptr ? 0.0f : element(p.residual, to, p.dtype));
          for (std::int64_t i = std::max<std::int64_t>(y - 1, 0); i < std::min(y + 2, p.height); ++i)
            for (std::int64_t j = std::max<std::int64_t>(x - 1, 0); j < std::min(x + 2, p.width); ++j)
              for (std::int64_t c = 0; c < p.channels; ++c)
                sum += element(p.x, ((b * height + i / p.upsampled) * width + j / p.upsampled) * p.channels + c, p.dtype) *
                       p.weights[((o * p.channels + c) * 3 + i - y + 1) * 3 + j - x + 1];
          set_element(p.out, to, sum, p.dtype);
        }
}

void check_channels(std::int64_t out_channels, std::int64_t channels) {
  check(channels > 0 && channels % kConvolutionChannels == 0, "channels must be a positive multiple of 32");
  check(out_channels > 0 && out_channels % kConvolutionOutputs == 0, "out_channels must be a positive multiple of 64");
}

}  // namespace

std::array<std::int64_t, 4> packed_convolution_shape(std::int64_t out_channels, std::int64_t channels, Implementation wanted) {
  check_channels(out_channels, channels);
  const Implementation implementation = resolve_rounding(wanted);
  if (implementation == Implementation::reference) return {out_channels, channels, 3, 3};
  const CpuKernels& kernels = require_kernels(implementation);
  return {out_channels / kernels.convolution_panel, 16, channels / kernels.convolution_depth, kernels.convolution_panel};
}

void pack_convolution(const float* weight, std::int64_t out_channels, std::int64_t channels, float* packed, const Parallel& pool,
                      Implementation wanted) {
  const auto [panels, products, units, panel] = packed_convolution_shape(out_channels, channels, wanted);
  const Implementation implementation = resolve_rounding(wanted);
  if (implementation == Implementation::reference) {
    std::memcpy(packed, weight, static_cast<std::size_t>(out_channels * channels * 9) * sizeof(float));
    return;
  }
  const CpuKernels& kernels = require_kernels(implementation);
  const std::int64_t width = panel, size = products * units * width;
  run_tasks(pool, panels, kernels.convolution_depth * products * width, [&](std::int64_t index, float* scratch) {
    kernels.pack_convolution(weight, channels, index * width, packed + index * size, scratch);
  });
}

void convolution(const ConvolutionParams& p, const Parallel& pool, int threads, Implementation wanted) {
  check_channels(p.out_channels, p.channels);
  check(p.batch >= 0 && p.height >= 0 && p.width >= 0, "batch, height and width must not be negative");
  check(p.height % 2 == 0 && p.width % 2 == 0, "height and width must be even");
  check(p.upsampled == 1 || p.upsampled == 2, "upsampled must be 1 or 2");
  check(p.dtype != DType::float16, "x must be float32 or bfloat16");
  const Implementation implementation = resolve_rounding(wanted);
  const std::int64_t tiles = p.batch * (p.height / 2) * (p.width / 2);
  if (tiles == 0) return;
  if (implementation == Implementation::reference) return convolution_reference(p);
  const CpuKernels& kernels = require_kernels(implementation);
  const std::int64_t at_once = std::max(threads, 1), rounds = (tiles + kMostTiles * at_once - 1) / (kMostTiles * at_once);
  const std::int64_t block = (tiles + rounds * at_once - 1) / (rounds * at_once);
  run_tasks(pool, (tiles + block - 1) / block, kernels.convolution_scratch(p, block), [&](std::int64_t index, float* scratch) {
    kernels.convolution_tiles(p, index * block, std::min(block, tiles - index * block), scratch);
  });
}

}  // namespace pidiff
