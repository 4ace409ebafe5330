// The arithmetic of one step on one element: what the processor's loop (solver.cc) and the GPU's kernel
// (step_kernel.cuh) both do, in one order, so that a seed's picture is the same on either. Both are compiled without
// contraction of a * b + c, which would round differently.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PIDIFF_EVERYWHERE __host__ __device__ __forceinline__
#else
#define PIDIFF_EVERYWHERE inline
#endif

namespace pidiff {

// A Step's coefficients (schedule.h) in the precision of the data, with the guidance. One row of the GPU's table.
struct StepRow {
  float input_scale, d_sample, d_output;
  float c_last, c_prev, c_prev2, c_denoised;
  float n_sample, n_denoised, n_prev, n_noise;
  float guidance_scale;
  // Terms that a step takes. A term that it does not take may hold NaN.
  std::int32_t guided, corrected, noisy;
  std::int32_t maps;  // the step's identity map counts for the average
};
static_assert(sizeof(StepRow) == 64, "a row of the table has 64 bytes");

// What a solver carries from step to step for one element.
struct StepElement {
  float latents, previous, previous2, last;  // previous: the clean prediction
};

PIDIFF_EVERYWHERE void advance(const StepRow& s, bool guided, bool corrected, bool noisy, float conditional,
                               float unconditional, float noise, StepElement& e) {
  const float output = guided ? unconditional + s.guidance_scale * (conditional - unconditional) : conditional;
  float x = e.latents;
  const float clean = s.d_sample * x + s.d_output * output;
  if (corrected) x = s.c_last * e.last + s.c_prev * e.previous + s.c_prev2 * e.previous2 + s.c_denoised * clean;
  float next = s.n_sample * x + s.n_denoised * clean + s.n_prev * e.previous;
  if (noisy) next += s.n_noise * noise;
  e.last = x;
  e.previous2 = e.previous;
  e.previous = clean;
  e.latents = next;
}

}  // namespace pidiff
