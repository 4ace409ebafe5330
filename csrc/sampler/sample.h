// The denoising loop: it owns the steps and calls out once per step for the engine and once for progress.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#include "sampler/schedule.h"

namespace pidiff {

struct Cancelled : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct SampleRequest {
  const Schedule* schedule = nullptr;
  std::vector<std::uint64_t> seeds;  // [batch], for the noise of euler_ancestral, lcm and tcd
  float guidance_scale = 1.0f;       // 1: off
  // Steps with guidance run the model on 2 * batch rows, the others on the last `batch` of them (if no step has
  // guidance, there are no others). Kynkaanniemi et al., arXiv 2404.07724: it pays in the middle of a schedule only.
  std::int64_t guided_from = 0, guided_until = INT64_MAX;
  std::size_t image_elements = 0;    // channels * height * width
  float* latents = nullptr;          // [batch, image_elements], in place
  float* denoised = nullptr;         // [batch, image_elements], each step's clean prediction
  void* model_input = nullptr;       // [rows, image_elements]: unconditional rows (with guidance), then conditional ones
  const void* model_output = nullptr;
  bool half_input = false, half_output = false;

  bool guided(std::int64_t step) const {
    return guidance_scale != 1.0f && guided_from <= step && step < guided_until;
  }
  // Whether any step has guidance: then both buffers have unconditional rows.
  bool any_guided() const;
};

// call_engine(step) fills model_output from model_input. on_step(step) returns true to stop; may be empty.
// Throws Cancelled, or std::runtime_error naming the step whose latents are not finite; what a callback throws passes
// through. The latents then hold the last state reached.
void sample(const SampleRequest& request, const std::function<void(std::int64_t)>& call_engine,
            const std::function<bool(std::int64_t)>& on_step);

}  // namespace pidiff
