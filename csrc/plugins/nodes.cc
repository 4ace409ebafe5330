#include "plugins/nodes.h"

#include <cmath>
#include <stdexcept>

namespace pidiff::nodes {
namespace {

void require(const Tensor& tensor, const char* name, const Shape& shape) {
  if (tensor.shape != shape)
    throw std::invalid_argument(std::string(name) + " must have shape " + text(shape) + ", got " + text(tensor.shape));
}
void require_rank(const Tensor& tensor, const char* name, std::size_t rank) {
  if (tensor.shape.size() != rank)
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(rank) + " axes, got " +
                                text(tensor.shape));
}

}  // namespace

std::string text(const Shape& shape) {
  std::string result = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + ")";
}

AttentionParams attention_params(const Tensor* inputs, const Attributes& attributes, DType dtype) {
  const Tensor &q = inputs[0], &k = inputs[1], &v = inputs[2];
  require_rank(q, "q", 3);
  require_rank(k, "k", 3);
  const std::int64_t batch = q.shape[0], queries = q.shape[1], channels = q.shape[2], keys = k.shape[1];
  require(k, "k", {batch, keys, channels});
  require(v, "v", {batch, keys, channels});
  if (attributes.num_heads < 1 || channels % attributes.num_heads != 0)
    throw std::invalid_argument("num_heads must divide the channels " + std::to_string(channels) + ", got " +
                                std::to_string(attributes.num_heads));
  AttentionParams p;
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.batch = batch;
  p.queries = queries;
  p.keys = keys;
  p.heads = attributes.num_heads;
  p.head_dim = channels / p.heads;
  p.q_stride = p.out_stride = {queries * channels, channels, p.head_dim};
  p.k_stride = p.v_stride = {keys * channels, channels, p.head_dim};
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  p.dtype = dtype;
  return p;
}

IdentityMixParams identity_params(const Tensor* inputs, const Attributes& attributes, const AttentionParams& text) {
  const std::int64_t batch = text.batch, queries = text.queries, channels = text.heads * text.head_dim;
  const Tensor &x = inputs[3], &a = inputs[4], &v_id = inputs[5], &mask = inputs[6], &scale = inputs[7];
  require_rank(v_id, "v_id", 4);
  IdentityMixParams p;
  p.people = v_id.shape[1];
  p.tokens = v_id.shape[2];
  p.has_null = attributes.has_null != 0;
  p.heads = text.heads;
  require(v_id, "v_id", {batch, p.people, p.tokens, channels});
  require(a, "a", {batch, p.people, channels, p.heads * p.columns()});
  require(mask, "mask", {batch, p.people, queries});
  require(scale, "scale", {batch});
  if (attributes.residual == 0) require(x, "x", {batch, queries, channels});
  p.h = p.out = text.out;
  p.y = attributes.residual != 0 ? text.out : x.data;
  p.a = a.data;
  p.v = v_id.data;
  p.mask = mask.data;
  p.id_scale = scale.data;
  p.batch = batch;
  p.queries = queries;
  p.channels = channels;
  p.h_stride = p.y_stride = p.out_stride = {queries * channels, channels};
  p.dtype = text.dtype;
  return p;
}

}  // namespace pidiff::nodes
