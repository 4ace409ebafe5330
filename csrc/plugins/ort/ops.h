// The custom operators of ONNX domain `pidiff`, for library.cc to register.
#pragma once

#include <vector>

#include "plugins/ort/abi.h"

namespace pidiff::ort {

// Attention and IdentityAttention, each for float and float16, for the CPU and, in a build with CUDA kernels, for ONNX
// Runtime's CUDA provider; `low` ones may round on the CPU where that is faster (kernels/attention.h, low_precision). They
// live as long as the process.
const std::vector<CustomOp>& all_ops(bool low);

}  // namespace pidiff::ort
