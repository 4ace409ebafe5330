// AVX2, FMA, F16C: 16 registers of eight floats (twelve sums, three of the row, one factor).
#define PIDIFF_LANES 8
#define PIDIFF_TILE 4
#include "kernels/attention_simd.h"

PIDIFF_CPU_KERNELS(avx2_kernels)
