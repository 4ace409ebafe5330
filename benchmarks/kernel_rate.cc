// The highest rate of multiply-adds that one thread reaches here: independent sums in registers, no memory. Built and
// called by kernels.py. Each function runs `rounds` rounds and returns how many floating-point operations those were
// (a multiply-add is two), or 0 where the processor lacks the instruction. The empty asm statements keep the compiler
// from seeing that sums and operands are all the same.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kSums = 24;  // more than latency times throughput of any processor with 32 registers

}  // namespace

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bf16"))) static double bfloat16(long rounds) {
  __m512 sums[kSums] = {};
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = a;
  for (auto& sum : sums) asm volatile("" : "+v"(sum));
  for (long i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], a, b);
  }
  for (auto& sum : sums) asm volatile("" ::"v"(sum));
  return 2.0 * 32 * kSums * static_cast<double>(rounds);
}

__attribute__((target("avx512f"))) static double float32_wide(long rounds) {
  __m512 sums[kSums] = {}, a = _mm512_set1_ps(0.5f), b = a;
  for (auto& sum : sums) asm volatile("" : "+v"(sum));
  for (long i = 0; i < rounds; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sums[j] = _mm512_fmadd_ps(a, b, sums[j]);
  }
  for (auto& sum : sums) asm volatile("" ::"v"(sum));
  return 2.0 * 16 * kSums * static_cast<double>(rounds);
}

__attribute__((target("avx2,fma"))) static double float32(long rounds) {
  constexpr int count = 12;  // sixteen registers
  __m256 sums[count] = {}, a = _mm256_set1_ps(0.5f), b = a;
  for (auto& sum : sums) asm volatile("" : "+x"(sum));
  for (long i = 0; i < rounds; ++i) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 12
    for (int j = 0; j < count; ++j) sums[j] = _mm256_fmadd_ps(a, b, sums[j]);
  }
  for (auto& sum : sums) asm volatile("" ::"x"(sum));
  return 2.0 * 8 * count * static_cast<double>(rounds);
}

alignas(64) static const struct {
  unsigned char palette = 1, start = 0, reserved[14] = {};
  unsigned short bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} tile_layout;

// Four products on eight tiles, as many as a kernel has in flight.
__attribute__((target("amx-tile,amx-bf16"))) static double tiles(long rounds) {
  _tile_loadconfig(&tile_layout);
  for (long i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 4 * 16 * 16 * 32 * static_cast<double>(rounds);
}

// To be called only where Linux has granted the tile registers, as it has when the core lists "amx".
extern "C" double amx_operations(long rounds) { return tiles(rounds); }

extern "C" double float32_operations(long rounds) {
  if (__builtin_cpu_supports("avx512f")) return float32_wide(rounds);
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? float32(rounds) : 0.0;
}

extern "C" double bfloat16_operations(long rounds) {
  return __builtin_cpu_supports("avx512bf16") ? bfloat16(rounds) : 0.0;
}
#elif defined(__aarch64__)
#include <arm_neon.h>

extern "C" double float32_operations(long rounds) {
  float32x4_t sums[kSums] = {}, a = vdupq_n_f32(0.5f), b = a;
  for (auto& sum : sums) asm volatile("" : "+w"(sum));
  for (long i = 0; i < rounds; ++i) {
    asm volatile("" : "+w"(a), "+w"(b));
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) sums[j] = vfmaq_f32(sums[j], a, b);
  }
  for (auto& sum : sums) asm volatile("" ::"w"(sum));
  return 2.0 * 4 * kSums * static_cast<double>(rounds);
}

extern "C" double bfloat16_operations(long) { return 0.0; }
extern "C" double amx_operations(long) { return 0.0; }
#endif
