// The custom operators of ONNX domain `pidiff`, for library.cc to register.
#pragma once

#include <cstddef>

#include "plugins/ort/abi.h"

namespace pidiff::ort {

// Attention and IdentityAttention, each for float and float16; `low` ones may round where that is faster
// (kernels/attention.h, low_precision). The operators live as long as the process.
constexpr std::size_t kOps = 4;
const CustomOp* const* all_ops(bool low);

}  // namespace pidiff::ort
