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

// Two floats rounded to 16-bit elements in one register, as `pack`.
template <class T>
PIDIFF_DEVICE std::uint32_t pack_floats(float low, float high);
template <>
PIDIFF_DEVICE std::uint32_t pack_floats<Half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(both);
}
template <>
PIDIFF_DEVICE std::uint32_t pack_floats<BFloat>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(both);
}

// 2^value to about 2 units of the last place; what would be denormal is zero.
PIDIFF_DEVICE float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(value));
  return result;
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

PIDIFF_DEVICE std::uint32_t shared_address(const void* at) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(at)); }

// Four 8 x 8 matrices of 16-bit elements: lanes 8 m to 8 m + 7 name the rows of matrix m (16-byte aligned); with g and t as above a
// lane receives elements (g, 2t) and (g, 2t + 1) of each. Two of them are the `b` operand for 8 rows, the keys, of [8, 16].
PIDIFF_DEVICE void load_matrices(std::uint32_t (&b)[2][2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(b[0][0]), "=r"(b[0][1]), "=r"(b[1][0]), "=r"(b[1][1])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed: a lane receives elements (2t, g) and (2t + 1, g) of each. Two of them are the `b` operand for a
// row-major [16, 8] block.
PIDIFF_DEVICE void load_transposed(std::uint32_t (&b)[2][2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(b[0][0]), "=r"(b[0][1]), "=r"(b[1][0]), "=r"(b[1][1])
               : "r"(shared_address(row))
               : "memory");
}
// Of two matrices, whose rows lanes 0 to 15 name.
PIDIFF_DEVICE void load_transposed(std::uint32_t (&b)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes of global memory, or with `inside` false zeros, to shared memory while the thread goes on; both 16-byte aligned. They are
// there for this thread after `wait_copies`, for the block after a barrier behind it.
PIDIFF_DEVICE void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)),
               "r"(inside ? 16 : 0)
               : "memory");
}
PIDIFF_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

}  // namespace pidiff::cuda

#endif
