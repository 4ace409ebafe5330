#include "sampler/sample.h"

#include <string>

#include "sampler/noise.h"
#include "sampler/solver.h"

namespace pidiff {

void sample(const SampleRequest& r, const std::function<void(std::int64_t)>& call_engine,
            const std::function<bool(std::int64_t)>& on_step) {
  const Schedule& schedule = *r.schedule;
  const std::size_t batch = r.seeds.size(), count = batch * r.image_elements;
  const bool guided = r.guidance_scale != 1.0f;
  SolverState state(count);
  std::vector<float> noise;

  ModelOutput output;
  output.half = r.half_output;
  output.guidance_scale = r.guidance_scale;
  const auto* base = static_cast<const char*>(r.model_output);
  output.unconditional = guided ? base : nullptr;
  output.conditional = guided ? base + count * (r.half_output ? 2 : 4) : base;

  for (std::int64_t i = 0; i < schedule.size(); ++i) {
    const Step& step = schedule.steps[static_cast<std::size_t>(i)];
    scale_input(r.latents, step.input_scale, count, r.model_input, r.half_input);
    if (guided) {
      auto* second = static_cast<char*>(r.model_input) + count * (r.half_input ? 2 : 4);
      scale_input(r.latents, step.input_scale, count, second, r.half_input);
    }
    call_engine(i);
    if (step.n_noise != 0.0) {
      noise.resize(count);
      for (std::size_t image = 0; image < batch; ++image)
        normal(r.seeds[image], static_cast<std::uint64_t>(i) + 1, noise.data() + image * r.image_elements,
               r.image_elements);
    }
    if (!state.advance(step, output, noise.empty() ? nullptr : noise.data(), r.latents, r.denoised))
      throw std::runtime_error("latents must stay finite, got NaN or infinity at step " + std::to_string(i));
    if (on_step && on_step(i)) throw Cancelled("cancelled after step " + std::to_string(i));
  }
}

}  // namespace pidiff
