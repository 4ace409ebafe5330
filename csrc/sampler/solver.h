// One step over the data, fused: guidance, clean prediction, corrector, solver update, noise, finite check.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sampler/schedule.h"
#include "sampler/step_element.h"

namespace pidiff {

// What the engine wrote. `conditional` alone without guidance; both halves with it. float32 or float16 elements.
struct ModelOutput {
  const void* conditional = nullptr;
  const void* unconditional = nullptr;  // null: no guidance
  float guidance_scale = 1.0f;          // m = u + scale * (c - u); Ho & Salimans, arXiv 2207.12598
  bool half = false;
};

// The coefficients of a step as its arithmetic takes them.
StepRow make_row(const Step& step, bool guided, float guidance_scale);

// The state a solver carries between steps: earlier clean predictions and corrected latents.
class SolverState {
 public:
  explicit SolverState(std::size_t elements);

  // latents [elements] in place; denoised [elements] gets the clean prediction. Steps must come in order.
  // Returns false if any new latent is not finite.
  bool advance(const Step& step, const ModelOutput& output, const float* noise, float* latents, float* denoised);

  std::size_t elements() const { return elements_; }
  void reset() { done_ = 0; }
  std::int64_t done() const { return done_; }  // steps taken

 private:
  std::size_t elements_;
  std::int64_t done_ = 0;
  std::vector<float> previous_, previous2_, last_;
};

// to[i] = from[i] * scale, as float32 or float16.
void scale_input(const float* from, double scale, std::size_t count, void* to, bool half);

}  // namespace pidiff
