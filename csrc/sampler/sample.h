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
  std::vector<std::uint64_t> seeds;  // [batch], for the noise of euler_ancestral and lcm
  float guidance_scale = 1.0f;       // 1: off, and the model runs on `batch` rows; else on 2 * batch
  std::size_t image_elements = 0;    // channels * height * width
  float* latents = nullptr;          // [batch, image_elements], in place
  float* denoised = nullptr;         // [batch, image_elements], each step's clean prediction
  void* model_input = nullptr;       // [rows, image_elements]: unconditional rows, then conditional ones
  const void* model_output = nullptr;
  bool half_input = false, half_output = false;
};

// call_engine(step) fills model_output from model_input. on_step(step) returns true to stop; may be empty.
// Throws Cancelled, or std::runtime_error naming the step whose latents are not finite; what a callback throws passes
// through. The latents then hold the last state reached.
void sample(const SampleRequest& request, const std::function<void(std::int64_t)>& call_engine,
            const std::function<bool(std::int64_t)>& on_step);

}  // namespace pidiff
