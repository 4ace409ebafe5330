// CUDA versions of both primitives. Present when the build found nvcc (PIDIFF_HAS_CUDA).
#pragma once

#include "kernels/attention.h"

namespace pidiff {

// A device is there and its driver works. Never throws.
bool cuda_available();

// Device pointers; asynchronous on `stream` (a cudaStream_t, null for the default stream). head_dim up to 160,
// identity columns (heads * (tokens + null)) up to 1024. Throws std::invalid_argument, std::runtime_error.
void attention_cuda(const AttentionParams& params, void* stream);
void identity_mix_cuda(const IdentityMixParams& params, void* stream);

// Host pointers: copies in, runs, copies out. For tests, and for hosts that keep nothing on the device.
void attention_cuda_host(const AttentionParams& params);
void identity_mix_cuda_host(const IdentityMixParams& params);

}  // namespace pidiff
