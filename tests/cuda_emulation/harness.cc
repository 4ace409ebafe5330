// extern "C" entry points for tests/test_cuda_emulation.py. dtype: 0 float32, 1 float16, 2 bfloat16.
#include <cmath>

#include "kernels/attention_cuda.cu"

using pidiff::DType;

extern "C" {

// Strides (batch, token) are in elements; heads lie side by side.
void emulate_attention(int dtype, const void* q, const void* k, const void* v, void* out, std::int64_t batch,
                       std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t dim,
                       const std::int64_t* q_stride, const std::int64_t* k_stride, const std::int64_t* v_stride) {
  pidiff::AttentionParams p;
  p.q = q;
  p.k = k;
  p.v = v;
  p.out = out;
  p.batch = batch;
  p.queries = queries;
  p.keys = keys;
  p.heads = heads;
  p.head_dim = dim;
  p.q_stride = {q_stride[0], q_stride[1], dim};
  p.k_stride = {k_stride[0], k_stride[1], dim};
  p.v_stride = {v_stride[0], v_stride[1], dim};
  p.out_stride = {queries * heads * dim, heads * dim, dim};
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.dtype = static_cast<DType>(dtype);
  pidiff::attention_cuda_host(p);
}

void emulate_identity_mix(int dtype, const void* h, const void* y, const void* a, const void* v, const void* mask,
                          const void* scale, void* out, void* mass, std::int64_t batch, std::int64_t queries,
                          std::int64_t channels, std::int64_t heads, std::int64_t tokens, std::int64_t people,
                          int has_null) {
  pidiff::IdentityMixParams p;
  p.h = h;
  p.y = y;
  p.a = a;
  p.v = v;
  p.mask = mask;
  p.id_scale = scale;
  p.out = out;
  p.id_mass = mass;
  p.batch = batch;
  p.queries = queries;
  p.channels = channels;
  p.heads = heads;
  p.tokens = tokens;
  p.people = people;
  p.has_null = has_null != 0;
  p.h_stride = p.y_stride = p.out_stride = {queries * channels, channels};
  p.dtype = static_cast<DType>(dtype);
  pidiff::identity_mix_cuda_host(p);
}
}
