// A convolution (convolution_params.h) whose weights are packed once.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/convolution_params.h"
#include "kernels/driver.h"

namespace pidiff {

// One convolution's weights, transformed and packed for an implementation.
class Convolution {
 public:
  static constexpr std::int64_t kChannels = 32, kOutChannels = 64;  // channels must be multiples of these

  // weight [out_channels, channels, 3, 3], bias [out_channels]. `automatic` takes the last implementation that computes in float32,
  // `low_precision` what rounds and is faster, where there is one.
  Convolution(const float* weight, const float* bias, std::int64_t out_channels, std::int64_t channels, const Parallel& pool,
              Implementation implementation = Implementation::automatic);

  // `threads`: how many the pool has, so that the work is split evenly.
  void operator()(ConvolutionParams params, const Parallel& pool, int threads) const;

  Implementation implementation() const { return implementation_; }
  std::int64_t channels() const { return channels_; }
  std::int64_t out_channels() const { return static_cast<std::int64_t>(bias_.size()); }

 private:
  Implementation implementation_;
  std::int64_t channels_;
  std::vector<float> bias_;
  Scratch weights_;  // packed; for `reference` as they came
};

}  // namespace pidiff
