// The custom operators of ONNX domain `pidiff`, for library.cc to register.
#pragma once

#include <cstddef>

#include "plugins/ort/abi.h"

namespace pidiff::ort {

// Attention and IdentityAttention, each for float and float16. The operators live as long as the process.
const CustomOp* const* all_ops(std::size_t* count);

}  // namespace pidiff::ort
