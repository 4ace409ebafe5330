// AMX on top of AVX-512: operands of both products rounded to bfloat16, sums and softmax in float32.
#define PIDIFF_LANES 16
#define PIDIFF_TILE 8
#define PIDIFF_BF16
#define PIDIFF_AMX
#include "kernels/attention_simd.h"

PIDIFF_CPU_KERNELS(amx_kernels)
