// The convolution of convolution_params.h: weights are packed once, for an implementation, then used by many calls.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/convolution_params.h"
#include "kernels/parallel.h"

namespace pidiff {

constexpr std::int64_t kConvolutionChannels = 32, kConvolutionOutputs = 64;  // channels and out_channels must be multiples of these

// Shape of packed weights, in floats: of [out_channels, channels, kernel, kernel]. `automatic` is the last implementation that computes in float32,
// `low_precision` what rounds and is faster, where there is one.
std::array<std::int64_t, 4> packed_convolution_shape(std::int64_t out_channels, std::int64_t channels, std::int64_t kernel, bool winograd,
                                                     Implementation implementation);

// weight [out_channels, channels, kernel, kernel] -> packed.
void pack_convolution(const float* weight, std::int64_t out_channels, std::int64_t channels, std::int64_t kernel, bool winograd, float* packed,
                      const Parallel& pool, Implementation implementation = Implementation::automatic);

// `threads`: how many the pool has, so that the work is split evenly.
void convolution(const ConvolutionParams& params, const Parallel& pool, int threads, Implementation implementation = Implementation::automatic);

}  // namespace pidiff
