// Launches of the CUDA kernels and the host-pointer versions.
//
// State of this file: compiled for sm_87, 89, 90 and 120; its kernels run on the CPU under tests/cuda_emulation, and have run on an H200
// (sm_90). benchmarks/gpu_check.sh does that in one command.
#include "kernels/attention_cuda.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels/attention_kernel.cuh"
#include "kernels/cuda_launch.cuh"
#include "kernels/identity_mix_kernel.cuh"

namespace pidiff {
namespace {

// Whether `count` elements of `size` bytes at a time lie in aligned words.
bool aligned(const void* base, std::initializer_list<std::int64_t> strides, int count, std::size_t size) {
  return reinterpret_cast<std::uintptr_t>(base) % (size * static_cast<std::size_t>(count)) == 0 &&
         std::all_of(strides.begin(), strides.end(), [&](std::int64_t stride) { return stride % count == 0; });
}

bool aligned(const void* base, const AttentionParams::Strides& s, int count) {
  return aligned(base, {s.batch, s.token, s.head}, count, 2);
}

template <class T, int Dim, int Tiles>
void launch_tensor(const AttentionParams& p, cudaStream_t stream) {
  const bool vectors = p.head_dim % 8 == 0 && aligned(p.k, p.k_stride, 8) && aligned(p.v, p.v_stride, 8);
  const bool pairs = p.head_dim % 2 == 0 && aligned(p.q, p.q_stride, 2) && aligned(p.out, p.out_stride, 2);
  constexpr int Rows = cuda::tensor_queries<Dim, Tiles>;
  const dim3 grid(static_cast<unsigned>((p.queries + Rows - 1) / Rows), static_cast<unsigned>(p.heads),
                  static_cast<unsigned>(p.batch));
  cuda::launch(cuda::attention_tensor<T, Dim, Tiles>, grid, cuda::kWarp * cuda::tensor_warps<Dim>, cuda::tensor_shared<Dim>, stream, p, vectors, pairs);
}

template <int D>
void launch_plain(const AttentionParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.queries + cuda::kPlainQueries - 1) / cuda::kPlainQueries),
                  static_cast<unsigned>(p.heads), static_cast<unsigned>(p.batch));
  cuda::launch(cuda::attention_plain<D>, grid, cuda::kPlainQueries * cuda::kPlainLanes,
               2 * cuda::kPlainKeys * D * static_cast<int>(sizeof(float)), stream, p);
}

template <class T>
void dispatch_tensor(const AttentionParams& p, cudaStream_t stream) {
  // The head dims that diffusion UNets have (32, 40, 64, 80, 160) without waste; the rest round up. A block of twice as many
  // queries reads keys and values half as often, where there are enough queries for all of the GPU and registers for them.
  const bool many = p.queries >= 1024;
  if (p.head_dim <= 32) return many ? launch_tensor<T, 32, 2>(p, stream) : launch_tensor<T, 32, 1>(p, stream);
  if (p.head_dim <= 40) return many ? launch_tensor<T, 40, 2>(p, stream) : launch_tensor<T, 40, 1>(p, stream);
  if (p.head_dim <= 64) return many ? launch_tensor<T, 64, 2>(p, stream) : launch_tensor<T, 64, 1>(p, stream);
  if (p.head_dim <= 80) return launch_tensor<T, 80, 1>(p, stream);
  return launch_tensor<T, 160, 1>(p, stream);
}

void dispatch_plain(const AttentionParams& p, cudaStream_t stream) {
  if (p.head_dim <= 40) return launch_plain<40>(p, stream);
  if (p.head_dim <= 80) return launch_plain<80>(p, stream);
  return launch_plain<160>(p, stream);
}

std::size_t extent(std::int64_t batch, std::int64_t tokens, std::int64_t last, std::int64_t batch_stride,
                   std::int64_t token_stride) {
  return static_cast<std::size_t>((batch - 1) * batch_stride + (tokens - 1) * token_stride + last);
}

void require_device() {
  if (!cuda_available()) throw std::runtime_error("implementation must be one that runs on this machine, got cuda");
}

template <int Rows>
void dispatch_mix(const IdentityMixParams& p, int shared, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.queries + Rows - 1) / Rows), static_cast<unsigned>(p.batch));
  const auto paired = [&](const void* at, const IdentityMixParams::Strides& s) {
    return aligned(at, {s.batch, s.token}, 2, size_of(p.dtype));
  };
  const bool pairs = p.channels / p.heads % 2 == 0 && paired(p.v, {}) && paired(p.y, p.y_stride) && paired(p.h, p.h_stride) &&
                     paired(p.out, p.out_stride);
  const auto run = [&](auto kernel) { cuda::launch(kernel, grid, cuda::kMixThreads, shared, stream, p, pairs); };
  switch (p.dtype) {
    case DType::float32: return run(cuda::identity_mix<float, Rows>);
    case DType::float16: return run(cuda::identity_mix<cuda::Half, Rows>);
    case DType::bfloat16: return run(cuda::identity_mix<cuda::BFloat, Rows>);
  }
}

}  // namespace

bool cuda_available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

void attention_cuda(const AttentionParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.head_dim > 160)
    throw std::invalid_argument("head_dim must not exceed 160 on CUDA, got " + std::to_string(p.head_dim));
  switch (p.dtype) {
    case DType::float32: return dispatch_plain(p, stream);
    case DType::float16: return dispatch_tensor<cuda::Half>(p, stream);
    case DType::bfloat16: return dispatch_tensor<cuda::BFloat>(p, stream);
  }
}

void identity_mix_cuda(const IdentityMixParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  constexpr std::int64_t limit = 99 * 1024;  // what every architecture built for can give one block
  const std::int64_t many = cuda::mix_shared_floats<16>(p) * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t few = cuda::mix_shared_floats<4>(p) * static_cast<std::int64_t>(sizeof(float));
  if (few > limit)
    throw std::invalid_argument("people * heads * columns must fit " + std::to_string(limit) +
                                " bytes of shared memory on CUDA, got " + std::to_string(few));
  if (many > limit) return dispatch_mix<4>(p, static_cast<int>(few), stream);
  dispatch_mix<16>(p, static_cast<int>(many), stream);
}

// The host versions copy each array whole, from its first to its last element, so strides stay as they are.
void attention_cuda_host(const AttentionParams& host) {
  require_device();
  AttentionParams p = host;
  const std::size_t size = size_of(p.dtype);
  const auto bytes = [&](std::int64_t tokens, const AttentionParams::Strides& s) {
    return size * extent(p.batch, tokens, (p.heads - 1) * s.head + p.head_dim, s.batch, s.token);
  };
  const cuda::Buffer q(host.q, bytes(p.queries, p.q_stride)), k(host.k, bytes(p.keys, p.k_stride));
  const cuda::Buffer v(host.v, bytes(p.keys, p.v_stride)), out(nullptr, bytes(p.queries, p.out_stride));
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.data();
  attention_cuda(p, nullptr);
  out.copy_to(host.out);
}

void identity_mix_cuda_host(const IdentityMixParams& host) {
  require_device();
  IdentityMixParams p = host;
  const std::size_t size = size_of(p.dtype);
  const auto bytes = [&](const IdentityMixParams::Strides& s) {
    return size * extent(p.batch, p.queries, p.channels, s.batch, s.token);
  };
  const std::size_t people = static_cast<std::size_t>(p.batch * p.people);
  const cuda::Buffer h(host.h, bytes(p.h_stride)), y(host.y, bytes(p.y_stride)), out(nullptr, bytes(p.out_stride));
  const cuda::Buffer a(host.a, size * people * static_cast<std::size_t>(p.channels * p.heads * p.columns()));
  const cuda::Buffer v(host.v, size * people * static_cast<std::size_t>(p.tokens * p.channels));
  const cuda::Buffer mask(host.mask, size * people * static_cast<std::size_t>(p.queries));
  const cuda::Buffer scale(host.id_scale, size * static_cast<std::size_t>(p.batch));
  const cuda::Buffer mass(nullptr, size * people * static_cast<std::size_t>(p.queries));
  p.h = h.data();
  p.y = y.data();
  p.a = a.data();
  p.v = v.data();
  p.mask = mask.data();
  p.id_scale = scale.data();
  p.out = out.data();
  p.id_mass = mass.data();
  identity_mix_cuda(p, nullptr);
  out.copy_to(host.out);
  mass.copy_to(host.id_mass);
}

}  // namespace pidiff
