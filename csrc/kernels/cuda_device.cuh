// What the CUDA kernels use of the device, in one place: element types, warp exchange, tensor-core instructions.
// The kernels in *_kernel.cuh are written against these names only, so that tests/cuda_emulation can define them on
// the CPU and run the same kernels thread by thread where there is no GPU.
#pragma once

#ifdef PIDIFF_CUDA_EMULATION
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define PIDIFF_KERNEL __global__
#define PIDIFF_DEVICE __device__ __forceinline__

namespace pidiff::cuda {

using Half = __half;
using BFloat = __nv_bfloat16;

PIDIFF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PIDIFF_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
PIDIFF_DEVICE std::int64_t block_x() { return blockIdx.x; }
PIDIFF_DEVICE std::int64_t block_y() { return blockIdx.y; }
PIDIFF_DEVICE std::int64_t block_z() { return blockIdx.z; }
PIDIFF_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
PIDIFF_DEVICE void sync_block() { __syncthreads(); }
PIDIFF_DEVICE float exchange_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

PIDIFF_DEVICE void keep_smallest(std::int32_t* at, std::int32_t value) { atomicMin(at, value); }

PIDIFF_DEVICE float to_float(float value) { return value; }
PIDIFF_DEVICE float to_float(Half value) { return __half2float(value); }
PIDIFF_DEVICE float to_float(BFloat value) { return __bfloat162float(value); }
template <class T>
PIDIFF_DEVICE T from_float(float value);
template <>
PIDIFF_DEVICE float from_float<float>(float value) { return value; }
template <>
PIDIFF_DEVICE Half from_float<Half>(float value) { return __float2half_rn(value); }
template <>
PIDIFF_DEVICE BFloat from_float<BFloat>(float value) { return __float2bfloat16_rn(value); }

// Two 16-bit elements in one register, `low` in the low half.
template <class T>
PIDIFF_DEVICE std::uint32_t pack(T low, T high) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  return static_cast<std::uint32_t>(reinterpret_cast<const std::uint16_t&>(low)) |
         static_cast<std::uint32_t>(reinterpret_cast<const std::uint16_t&>(high)) << 16;
}

// c [16, 8] += a [16, 16] b [16, 8] by one warp (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With g = lane / 4 and
// t = lane % 4 a lane holds
//   a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)     b: (2t.., g), (2t + 8.., g)
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
PIDIFF_DEVICE void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
PIDIFF_DEVICE void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], BFloat) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two 8 x 8 matrices of 16-bit elements, transposed: lanes 0-15 name the 16 rows (16-byte aligned); a lane receives
// elements (2t, g) and (2t + 1, g) of each, which is the `b` operand above for a row-major [16, 8] block.
PIDIFF_DEVICE void load_transposed(std::uint32_t (&b)[2], const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n" : "=r"(b[0]), "=r"(b[1]) : "r"(address));
}

}  // namespace pidiff::cuda

#endif
