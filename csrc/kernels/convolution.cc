// Validation, packing and the split of a Convolution into tasks; its reference.
#include "kernels/convolution.h"

#include <algorithm>
#include <cstring>

#include "kernels/attention_cpu.h"

namespace pidiff {
namespace {

constexpr std::int64_t kMostTiles = 96;  // of a task: 1 MB of transformed inputs for 320 channels in bfloat16

// Clear loops, single-threaded.
void convolution_reference(const ConvolutionParams& p, const float* weight) {
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
                       weight[((o * p.channels + c) * 3 + i - y + 1) * 3 + j - x + 1];
          set_element(p.out, to, sum, p.dtype);
        }
}

std::int64_t packed_floats(Implementation implementation, std::int64_t out_channels, std::int64_t channels) {
  if (implementation == Implementation::reference) return out_channels * channels * 9;
  return 16 * out_channels * (channels / require_kernels(implementation).convolution_depth);
}

}  // namespace

Convolution::Convolution(const float* weight, const float* bias, std::int64_t out_channels, std::int64_t channels, const Parallel& pool,
                         Implementation wanted)
    : implementation_(resolve_rounding(wanted)),
      channels_(channels),
      bias_(bias, bias + out_channels),
      weights_(packed_floats(implementation_, out_channels, channels)) {
  check(channels > 0 && channels % kChannels == 0, "channels must be a positive multiple of 32");
  check(out_channels > 0 && out_channels % kOutChannels == 0, "out_channels must be a positive multiple of 64");
  if (implementation_ == Implementation::reference) {
    std::memcpy(weights_.get(), weight, static_cast<std::size_t>(out_channels * channels * 9) * sizeof(float));
    return;
  }
  const CpuKernels& kernels = require_kernels(implementation_);
  const std::int64_t panel = kernels.convolution_panel, size = 16 * panel * (channels / kernels.convolution_depth);
  run_tasks(pool, out_channels / panel, kernels.convolution_depth * 16 * panel, [&](std::int64_t index, float* scratch) {
    kernels.pack_convolution(weight, channels, index * panel, weights_.get() + index * size, scratch);
  });
}

void Convolution::operator()(ConvolutionParams p, const Parallel& pool, int threads) const {
  check(p.batch >= 0 && p.height >= 0 && p.width >= 0, "batch, height and width must not be negative");
  check(p.height % 2 == 0 && p.width % 2 == 0, "height and width must be even");
  check(p.upsampled == 1 || p.upsampled == 2, "upsampled must be 1 or 2");
  check(p.dtype != DType::float16, "x must be float32 or bfloat16");
  p.bias = bias_.data();
  p.channels = channels_;
  p.out_channels = out_channels();
  const std::int64_t tiles = p.batch * (p.height / 2) * (p.width / 2);
  if (tiles == 0) return;
  if (implementation_ == Implementation::reference) return convolution_reference(p, weights_.get());
  const CpuKernels& kernels = require_kernels(implementation_);
  const std::int64_t at_once = std::max(threads, 1), rounds = (tiles + kMostTiles * at_once - 1) / (kMostTiles * at_once);
  const std::int64_t block = (tiles + rounds * at_once - 1) / (rounds * at_once);
  run_tasks(pool, (tiles + block - 1) / block, kernels.convolution_scratch(p, block), [&](std::int64_t index, float* scratch) {
    kernels.convolution_tiles(p, weights_.get(), index * block, std::min(block, tiles - index * block), scratch);
  });
}

}  // namespace pidiff
