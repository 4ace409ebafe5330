// C entry points on device pointers, for gpu_attention.py. dtype: 0 float32, 1 float16, 2 bfloat16. 0 means success.
#include <cmath>
#include <cstdio>
#include <exception>

#include "kernels/attention_cuda.h"

namespace {
template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
}  // namespace

extern "C" int device_attention(int dtype, const void* q, const void* k, const void* v, void* out, std::int64_t batch,
                                std::int64_t queries, std::int64_t keys, std::int64_t heads, std::int64_t dim,
                                void* stream) {
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
  p.q_stride = p.out_stride = {queries * heads * dim, heads * dim, dim};
  p.k_stride = p.v_stride = {keys * heads * dim, heads * dim, dim};
  p.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.dtype = static_cast<pidiff::DType>(dtype);
  return guarded([&] { pidiff::attention_cuda(p, stream); });
}

extern "C" int device_identity_mix(int dtype, const void* h, const void* y, const void* a, const void* v,
                                   const void* mask, const void* scale, void* out, void* mass, std::int64_t batch,
                                   std::int64_t queries, std::int64_t channels, std::int64_t heads,
                                   std::int64_t tokens, std::int64_t people, int has_null, void* stream) {
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
  p.dtype = static_cast<pidiff::DType>(dtype);
  return guarded([&] { pidiff::identity_mix_cuda(p, stream); });
}
