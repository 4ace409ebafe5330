// The device as csrc/kernels/cuda_device.cuh and cuda_launch.cuh define it, on the CPU: every CUDA thread of a block is
// a fiber, barriers and warp operations switch between them, and the tensor-core instructions follow the fragment
// layouts of the PTX ISA. Slow, and it proves nothing about speed, memory limits or races between blocks; it does show
// that the kernels' indices, masks and arithmetic are right.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "kernels/half.h"

#define PIDIFF_KERNEL
#define PIDIFF_DEVICE inline

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace pidiff::cuda {

// --- one block of fibers --------------------------------------------------------------------------------------------

struct Barrier {
  int arrived = 0;
  long round = 0;
};

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<bool> finished;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<unsigned char> shared;
  ucontext_t scheduler;
  std::function<void()> body;
  dim3 index{0, 0, 0};
  int current = 0;
  // What each thread of the block shows to its warp.
  std::vector<float> value;
  std::vector<const void*> pointer;
  std::vector<std::uint32_t> fragment;  // six words each: a, b
  // Asynchronous copies of each thread that it has not waited for.
  struct Copy {
    void* to;
    const void* from;
    bool inside;
  };
  std::vector<std::vector<Copy>> copies;
};

constexpr std::size_t kStackBytes = 64 * 1024;

inline Block* block = nullptr;

inline void yield() { swapcontext(&block->fibers[block->current], &block->scheduler); }

inline void wait(Barrier& barrier, int threads) {
  const long round = barrier.round;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) yield();
}

inline void enter() {
  block->body();
  block->finished[static_cast<std::size_t>(block->current)] = true;
  yield();
}

inline void run_block(dim3 index, int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  Block own;
  block = &own;
  own.index = index;
  own.body = body;
  const auto count = static_cast<std::size_t>(threads);
  own.fibers.resize(count);
  own.stacks.resize(count);
  own.finished.assign(count, false);
  own.warps.resize((count + 31) / 32);
  own.shared.assign(shared_bytes + 16, 0xAB);  // uninitialised, as on the device
  own.value.resize(count);
  own.pointer.resize(count);
  own.fragment.resize(count * 6);
  own.copies.resize(count);
  for (std::size_t i = 0; i < count; ++i) {
    getcontext(&own.fibers[i]);
    own.stacks[i].reset(new char[kStackBytes]);  // not cleared: most of it is never touched
    own.fibers[i].uc_stack.ss_sp = own.stacks[i].get();
    own.fibers[i].uc_stack.ss_size = kStackBytes;
    own.fibers[i].uc_link = nullptr;
    makecontext(&own.fibers[i], reinterpret_cast<void (*)()>(enter), 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (std::size_t i = 0; i < count; ++i) {
      if (own.finished[i]) continue;
      left = true;
      own.current = static_cast<int>(i);
      swapcontext(&own.scheduler, &own.fibers[i]);
    }
  }
  block = nullptr;
}

// --- cuda_device.cuh ------------------------------------------------------------------------------------------------

struct Half {
  std::uint16_t bits;
};
struct BFloat {
  std::uint16_t bits;
};

inline int thread_index() { return block->current; }
inline int thread_count() { return static_cast<int>(block->fibers.size()); }
inline std::int64_t block_x() { return block->index.x; }
inline std::int64_t block_y() { return block->index.y; }
inline std::int64_t block_z() { return block->index.z; }
inline unsigned char* shared_memory() {
  auto address = reinterpret_cast<std::uintptr_t>(block->shared.data());
  return reinterpret_cast<unsigned char*>((address + 15) / 16 * 16);
}
inline void sync_block() { wait(block->all, thread_count()); }
inline void sync_warp() {
  const int warp = thread_index() / 32, left = thread_count() - warp * 32;
  wait(block->warps[static_cast<std::size_t>(warp)], left < 32 ? left : 32);
}

inline float exchange_xor(float value, int mask) {
  block->value[static_cast<std::size_t>(thread_index())] = value;
  sync_warp();
  const float other = block->value[static_cast<std::size_t>(thread_index() ^ mask)];
  sync_warp();
  return other;
}

inline void keep_smallest(std::int32_t* at, std::int32_t value) { *at = value < *at ? value : *at; }

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return half_to_float(value.bits); }
inline float to_float(BFloat value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) { return value; }
template <>
inline Half from_float<Half>(float value) { return {float_to_half(value)}; }
template <>
inline BFloat from_float<BFloat>(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <class T>
std::uint32_t pack(T low, T high) {
  return static_cast<std::uint32_t>(low.bits) | static_cast<std::uint32_t>(high.bits) << 16;
}

template <class T>
std::uint32_t pack_floats(float low, float high) {
  return pack(from_float<T>(low), from_float<T>(high));
}

inline float exp2_fast(float value) { return std::exp2(value); }

template <class T>
float element(std::uint32_t word, int index) {
  return to_float(T{static_cast<std::uint16_t>(word >> (16 * index))});
}

// PTX ISA 9.7.14, mma.m16n8k16: register r of `a` holds row g + 8 (r % 2), columns 2t + 8 (r / 2) and the next;
// register r of `b` rows 2t + 8 r and the next, column g; c: row g + 8 (i / 2), column 2t + i % 2.
template <class T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], T) {
  const int warp = thread_index() / 32 * 32, lane = thread_index() % 32;
  std::memcpy(&block->fragment[static_cast<std::size_t>(thread_index()) * 6], a, sizeof a);
  std::memcpy(&block->fragment[static_cast<std::size_t>(thread_index()) * 6 + 4], b, sizeof b);
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int a_lane = row % 8 * 4 + k % 8 / 2, b_lane = column * 4 + k % 8 / 2;
      const auto* theirs_a = &block->fragment[static_cast<std::size_t>(warp + a_lane) * 6];
      const auto* theirs_b = &block->fragment[static_cast<std::size_t>(warp + b_lane) * 6 + 4];
      c[i] += element<T>(theirs_a[row / 8 + 2 * (k / 8)], k % 2) * element<T>(theirs_b[k / 8], k % 2);
    }
  }
  sync_warp();
}

// ldmatrix: lane 8 m + r names row r of matrix m; a lane receives elements (g, 2t) and (g, 2t + 1), transposed (2t, g) and (2t + 1, g).
inline void load_words(std::uint32_t* words, int matrices, const void* row, bool transposed) {
  const int warp = thread_index() / 32 * 32, lane = thread_index() % 32, group = lane / 4, quad = lane % 4;
  if (lane < matrices * 8 && reinterpret_cast<std::uintptr_t>(row) % 16 != 0) std::abort();
  block->pointer[static_cast<std::size_t>(thread_index())] = row;
  sync_warp();
  for (int m = 0; m < matrices; ++m) {
    std::uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int r = transposed ? quad * 2 + e : group, column = transposed ? group : quad * 2 + e;
      const void* from = block->pointer[static_cast<std::size_t>(warp + m * 8 + r)];
      std::memcpy(&pair[e], static_cast<const char*>(from) + column * 2, 2);
    }
    words[m] = static_cast<std::uint32_t>(pair[0]) | static_cast<std::uint32_t>(pair[1]) << 16;
  }
  sync_warp();
}
inline void load_matrices(std::uint32_t (&b)[2][2], const void* row) { load_words(b[0], 4, row, false); }
inline void load_transposed(std::uint32_t (&b)[2][2], const void* row) { load_words(b[0], 4, row, true); }
inline void load_transposed(std::uint32_t (&b)[2], const void* row) { load_words(b, 2, row, true); }

// cp.async: nothing is there before the thread has waited.
inline void copy_async(void* to, const void* from, bool inside) {
  const auto unaligned = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at) % 16 != 0; };
  if (unaligned(to) || unaligned(from)) std::abort();
  block->copies[static_cast<std::size_t>(thread_index())].push_back({to, from, inside});
}
inline void wait_copies() {
  auto& mine = block->copies[static_cast<std::size_t>(thread_index())];
  for (const auto& copy : mine) copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  mine.clear();
}

// --- cuda_launch.cuh ------------------------------------------------------------------------------------------------

class Buffer {
 public:
  Buffer(const void* host, std::size_t bytes) : bytes_(bytes), data_(std::aligned_alloc(256, (bytes / 256 + 1) * 256)) {
    host != nullptr ? std::memcpy(data_, host, bytes) : std::memset(data_, 0xAB, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }
  void copy_to(void* host) const { std::memcpy(host, data_, bytes_); }

 private:
  std::size_t bytes_;
  void* data_;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x)
        run_block(dim3(x, y, z), threads, static_cast<std::size_t>(shared_bytes), [&] { kernel(arguments...); });
}

}  // namespace pidiff::cuda
