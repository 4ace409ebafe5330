#include "sampler/sample.h"

#include <algorithm>
#include <string>

#include "sampler/noise.h"
#include "sampler/solver.h"

namespace pidiff {

bool SampleRequest::any_guided() const {
  return guidance_scale != 1.0f && std::max<std::int64_t>(guided_from, 0) < std::min(guided_until, schedule->size());
}

void sample(const SampleRequest& r, const std::function<void(std::int64_t)>& call_engine,
            const std::function<bool(std::int64_t)>& on_step) {
  const Schedule& schedule = *r.schedule;
  const std::size_t batch = r.seeds.size(), count = batch * r.image_elements;
  SolverState state(count);
  std::vector<float> noise;

  ModelOutput output;
  output.half = r.half_output;
  output.guidance_scale = r.guidance_scale;
  const std::size_t before = r.any_guided() ? count : 0;  // elements of the unconditional rows
  const auto* first_output = static_cast<const char*>(r.model_output);
  output.conditional = first_output + before * (r.half_output ? 2 : 4);
  char* const conditional_input = static_cast<char*>(r.model_input) + before * (r.half_input ? 2 : 4);

  for (std::int64_t i = 0; i < schedule.size(); ++i) {
    const Step& step = schedule.steps[static_cast<std::size_t>(i)];
    const bool guided = r.guided(i);
    output.unconditional = guided ? first_output : nullptr;
    scale_input(r.latents, step.input_scale, count, conditional_input, r.half_input);
    if (guided) scale_input(r.latents, step.input_scale, count, r.model_input, r.half_input);
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
