// AVX-512 F/BW/DQ/VL: 32 registers of sixteen floats (24 sums).
#define PIDIFF_LANES 16
#define PIDIFF_TILE 8
#include "kernels/attention_simd.h"

PIDIFF_CPU_KERNELS(avx512_kernels)
