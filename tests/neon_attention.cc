// The primitives' NEON version against the clear loops, on sizes that leave every kind of rest. Cross-compiled and run
// under qemu by tests/test_neon.py; prints the number of cases, or the first that fails.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/attention_cpu.h"
#include "kernels/convolution.h"

namespace {

using namespace pidiff;
using Bytes = std::vector<unsigned char>;

std::mt19937 generator(7);
int cases = 0;

// `count` normal numbers of a storage type, kept as bytes.
Bytes normal(std::int64_t count, DType dtype, float factor = 1.0f) {
  std::normal_distribution<float> draw;
  Bytes bytes(static_cast<std::size_t>(count) * size_of(dtype));
  for (std::int64_t i = 0; i < count; ++i) set_element(bytes.data(), i, draw(generator) * factor, dtype);
  return bytes;
}

// A few float32 roundings of values of order `largest`; in 16 bits one step of the result.
bool close(const Bytes& got, const Bytes& expected, DType dtype, float largest, const std::string& what) {
  ++cases;
  const float step = dtype == DType::float32 ? 0.0f : dtype == DType::float16 ? 0x1p-10f : 0x1p-7f;
  for (std::size_t i = 0; i < got.size() / size_of(dtype); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    const float a = element(got.data(), index, dtype), b = element(expected.data(), index, dtype);
    const float allowed = 4e-6f * largest + std::fabs(b) * step;
    if (std::fabs(a - b) <= allowed) continue;
    std::printf("%s [%zu]: got %g, expected %g\n", what.c_str(), i, a, b);
    return false;
  }
  return true;
}

bool check_attention(std::int64_t queries, std::int64_t keys, std::int64_t d, DType dtype) {
  const std::int64_t heads = 3, channels = heads * d, row = 2 * channels;  // every other row: strided
  const Bytes q = normal(queries * row, dtype), k = normal(keys * row, dtype), v = normal(keys * row, dtype);
  Bytes got(queries * channels * size_of(dtype)), expected = got;
  AttentionParams p;
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.batch = 1;
  p.queries = queries;
  p.keys = keys;
  p.heads = heads;
  p.head_dim = d;
  p.q_stride = p.k_stride = p.v_stride = {0, row, d};
  p.out_stride = {0, channels, d};
  p.scale = 1.0f / std::sqrt(static_cast<float>(d));
  p.dtype = dtype;
  p.out = got.data();
  attention(p, no_threads(), Implementation::portable);
  p.out = expected.data();
  attention(p, no_threads(), Implementation::reference);
  return close(got, expected, dtype, 4.0f,
               "attention S " + std::to_string(queries) + " T " + std::to_string(keys) + " d " + std::to_string(d));
}

bool check_identity(std::int64_t queries, std::int64_t heads, std::int64_t d, std::int64_t people, DType dtype) {
  const std::int64_t tokens = 4, channels = heads * d;
  IdentityMixParams p;
  p.queries = queries;
  p.channels = channels;
  p.heads = heads;
  p.tokens = tokens;
  p.people = people;
  p.batch = 1;
  p.has_null = true;
  p.dtype = dtype;
  p.h_stride = p.y_stride = p.out_stride = {0, channels};
  const Bytes h = normal(queries * channels, dtype), y = normal(queries * channels, dtype);
  const Bytes a = normal(people * channels * heads * p.columns(), dtype, 1 / std::sqrt(static_cast<float>(channels)));
  const Bytes v = normal(people * tokens * channels, dtype), mask = normal(people * queries, dtype);
  const Bytes scale = normal(1, dtype);
  p.h = h.data();
  p.y = y.data();
  p.a = a.data();
  p.v = v.data();
  p.mask = mask.data();
  p.id_scale = scale.data();
  Bytes out[2] = {h, h}, mass[2];
  for (int i = 0; i < 2; ++i) {
    mass[i].resize(people * queries * size_of(dtype));
    p.out = out[i].data();
    p.id_mass = mass[i].data();
    identity_mix(p, no_threads(), i == 0 ? Implementation::portable : Implementation::reference);
  }
  const std::string what = "identity_mix S " + std::to_string(queries) + " d " + std::to_string(d);
  return close(out[0], out[1], dtype, 16.0f, what) && close(mass[0], mass[1], dtype, 1.0f, what + " mass");
}

bool check_group_norm(std::int64_t rows, std::int64_t channels, std::int64_t groups, DType dtype) {
  const Bytes x = normal(2 * rows * channels, dtype), shift = normal(channels, dtype);
  const Bytes weight = normal(channels, DType::float32), bias = normal(channels, DType::float32);
  GroupNormParams p;
  p.x = x.data();
  p.shift = shift.data();
  p.weight = reinterpret_cast<const float*>(weight.data());
  p.bias = reinterpret_cast<const float*>(bias.data());
  p.batch = 2;
  p.rows = rows;
  p.channels = channels;
  p.groups = groups;
  p.silu = true;
  p.dtype = dtype;
  Bytes got(x.size()), expected(x.size());
  p.out = got.data();
  group_norm(p, no_threads(), Implementation::portable);
  p.out = expected.data();
  group_norm(p, no_threads(), Implementation::reference);
  return close(got, expected, dtype, 8.0f, "group_norm C " + std::to_string(channels));
}

bool check_convolution(std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t outputs, bool winograd, DType dtype) {
  const Bytes x = normal(2 * height * width * channels, dtype), residual = normal(2 * height * width * outputs, dtype);
  const Bytes weight = normal(outputs * channels * 9, DType::float32, 1 / std::sqrt(9.0f * static_cast<float>(channels)));
  const Bytes bias = normal(outputs, DType::float32);
  ConvolutionParams p;
  p.x = x.data();
  p.bias = reinterpret_cast<const float*>(bias.data());
  p.residual = residual.data();
  p.channels = channels;
  p.out_channels = outputs;
  p.batch = 2;
  p.height = height;
  p.width = width;
  p.winograd = winograd;
  p.dtype = dtype;
  Bytes out[2] = {residual, residual};
  for (int i = 0; i < 2; ++i) {
    p.out = out[i].data();
    const Implementation implementation = i == 0 ? Implementation::portable : Implementation::reference;
    const auto shape = packed_convolution_shape(outputs, channels, 3, winograd, implementation);
    std::vector<float> packed(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
    pack_convolution(reinterpret_cast<const float*>(weight.data()), outputs, channels, 3, winograd, packed.data(), no_threads(), implementation);
    p.weights = packed.data();
    convolution(p, no_threads(), 1, implementation);
  }
  return close(out[0], out[1], dtype, 8.0f, "convolution C " + std::to_string(channels));
}

}  // namespace

int main() {
  if (std::strcmp(name_of(Implementation::portable), "neon") != 0) return std::puts("not built for 64-bit Arm"), 1;
  for (DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (std::int64_t d : {1, 8, 40, 63, 80, 160})
      for (const auto& [queries, keys] : {std::pair{1, 77}, {77, 1}, {13, 129}, {129, 200}})
        if (!check_attention(queries, keys, d, dtype)) return 1;
    for (std::int64_t d : {5, 40, 80})
      for (std::int64_t people : {1, 3})
        if (!check_identity(33, 3, d, people, dtype)) return 1;
    for (const auto& [rows, channels, groups] : {std::tuple{1, 6, 3}, {70, 64, 32}, {300, 330, 5}})
      if (!check_group_norm(rows, channels, groups, dtype)) return 1;
    if (dtype == DType::float16) continue;
    for (const auto& [height, width, channels, outputs] : {std::tuple{2, 4, 32, 64}, {12, 18, 64, 128}})
      for (bool winograd : {true, false})
        if (!check_convolution(height, width, channels, outputs, winograd, dtype)) return 1;
  }
  std::printf("%d cases\n", cases);
}
