// Convolution, 3 x 3 with padding 1 or 1 x 1 (a linear layer is that of pictures of one line), of pictures whose channels lie together:
// directly, or for 3 x 3 and stride 1 by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, arXiv 1509.09308), four outputs from sixteen products in
// place of thirty-six:
//
//   out = A^T [ sum over channels of (G w G^T) * (B^T x B) ] A + bias + residual      for every tile of 2 x 2 outputs and its 4 x 4 inputs
//
// Sums are float32. `avx512bf16` (and `amx`, which does it by the same instructions) rounds what is multiplied to bfloat16: by Winograd's way the
// transforms, an error some two and a half times that of rounding the result.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace pidiff {

struct ConvolutionParams {
  const void* x = nullptr;         // [batch, height * stride / upsampled, width likewise, channels], contiguous
  const float* weights = nullptr;  // packed for the implementation (convolution.h), on a cache line's start
  const float* bias = nullptr;     // [out_channels]
  const void* residual = nullptr;  // [batch, height, width, out_channels]; null for none
  void* out = nullptr;             // as residual, and may be it; may not overlap x
  std::int64_t batch = 0, height = 0, width = 0, channels = 0, out_channels = 0;
  std::int64_t kernel = 3;     // or 1: a side of the weights
  std::int64_t stride = 1;     // or 2: every second pixel of every second line, the first ones among them
  std::int64_t upsampled = 1;  // or 2: every pixel of x is four
  bool winograd = true;        // for kernel 3, stride 1 and even height and width only
  DType dtype = DType::float32;  // or bfloat16
};

}  // namespace pidiff
