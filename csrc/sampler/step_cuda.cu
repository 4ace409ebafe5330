// Launches of the step's kernels. They run on the CPU under tests/cuda_emulation too.
#include "sampler/step_cuda.h"

#include <algorithm>

#include "kernels/cuda_launch.cuh"
#include "sampler/step_kernel.cuh"

namespace pidiff {
namespace {

dim3 blocks_for(std::int64_t threads) {
  return dim3(static_cast<unsigned>((threads + cuda::kStepThreads - 1) / cuda::kStepThreads));
}

}  // namespace

void queue_step_input(const StepParams& p, void* stream) {
  cuda::launch(cuda::step_input, blocks_for(std::max({p.elements, p.time_elements, p.rows})), cuda::kStepThreads, 0,
               static_cast<cudaStream_t>(stream), p);
}

void queue_step_output(const StepParams& p, void* stream) {
  cuda::launch(cuda::step_output, blocks_for(std::max(p.elements, p.map_elements)), cuda::kStepThreads, 0,
               static_cast<cudaStream_t>(stream), p);
}

}  // namespace pidiff
