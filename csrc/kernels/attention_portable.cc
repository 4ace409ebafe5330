// Vectors of four floats: SSE2 on x86, NEON on 64-bit Arm (32 registers, hence the larger tile), anything elsewhere.
#define PIDIFF_LANES 4
#ifdef __aarch64__
#define PIDIFF_TILE 8
#else
#define PIDIFF_TILE 4
#endif
#include "kernels/attention_simd.h"

PIDIFF_CPU_KERNELS(portable_kernels)
