// The nodes of ONNX domain `pidiff`, version 1, as the kernels' parameters: what every carrier that computes them shares.
//
//   Attention(q [B,S,C], k [B,T,C], v [B,T,C]; num_heads) -> out [B,S,C]
//   IdentityAttention(q [B,S,C], k [B,T,C], v [B,T,C], x [B,S,C], a [B,P,C,H*T'], v_id [B,P,T_id,C], mask [B,P,S],
//                     scale [B]; num_heads, has_null, residual) -> out [B,S,C], id_mass [B,P,S]
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/attention.h"

namespace pidiff::nodes {

constexpr std::size_t kAttentionInputs = 3, kIdentityInputs = 8;

// Attributes; the last two are IdentityAttention's only.
struct Attributes {
  std::int64_t num_heads = 0, has_null = 0, residual = 0;
};

using Shape = std::vector<std::int64_t>;

// A contiguous array.
struct Tensor {
  const void* data = nullptr;
  Shape shape;
};

std::string text(const Shape& shape);  // (2, 77, 320)

// q, k, v -> everything but `out`. Throws std::invalid_argument naming the input or attribute that is wrong.
AttentionParams attention_params(const Tensor* inputs, const Attributes& attributes, DType dtype);

// All eight inputs, with the parameters of the text attention and its `out`, which becomes the identity term's `h` and
// `out` at once (identity_mix reads a row before it writes it) -> everything but `id_mass`. Throws likewise.
IdentityMixParams identity_params(const Tensor* inputs, const Attributes& attributes, const AttentionParams& text);

}  // namespace pidiff::nodes
