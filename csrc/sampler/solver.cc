#include "sampler/solver.h"

#include "kernels/half.h"

namespace pidiff {
namespace {

inline float read(const float* from, std::size_t i) { return from[i]; }
inline float read(const std::uint16_t* from, std::size_t i) { return half_to_float(from[i]); }

struct Buffers {
  const float* noise;  // null: none
  float *latents, *denoised, *previous, *previous2, *last;
};

// The one pass. Template flags take the untaken terms out of the loop: a term with coefficient 0 may hold NaN.
template <bool Guided, bool Corrected, bool Noisy, class Element>
float pass(const Step& step, const Element* conditional, const Element* unconditional, float guidance,
           const Buffers& b, std::size_t count) {
  const auto f = [](double value) { return static_cast<float>(value); };
  const float d_sample = f(step.d_sample), d_output = f(step.d_output);
  const float c_last = f(step.c_last), c_prev = f(step.c_prev), c_prev2 = f(step.c_prev2);
  const float c_denoised = f(step.c_denoised);
  const float n_sample = f(step.n_sample), n_denoised = f(step.n_denoised), n_prev = f(step.n_prev);
  const float n_noise = f(step.n_noise);
  float poison = 0.0f;  // 0 while everything is finite, NaN afterwards
  for (std::size_t i = 0; i < count; ++i) {
    float output = read(conditional, i);
    if (Guided) {
      const float without = read(unconditional, i);
      output = without + guidance * (output - without);
    }
    float x = b.latents[i];
    const float clean = d_sample * x + d_output * output;
    if (Corrected)
      x = c_last * b.last[i] + c_prev * b.previous[i] + c_prev2 * b.previous2[i] + c_denoised * clean;
    float next = n_sample * x + n_denoised * clean + n_prev * b.previous[i];
    if (Noisy) next += n_noise * b.noise[i];
    b.last[i] = x;
    b.previous2[i] = b.previous[i];
    b.previous[i] = clean;
    b.denoised[i] = clean;
    b.latents[i] = next;
    poison += next * 0.0f;
  }
  return poison;
}

template <class Element>
float dispatch(const Step& step, const ModelOutput& output, const Buffers& b, std::size_t count) {
  const auto* c = static_cast<const Element*>(output.conditional);
  const auto* u = static_cast<const Element*>(output.unconditional);
  const float g = output.guidance_scale;
  const bool noisy = b.noise != nullptr;
  if (u != nullptr) {
    if (step.corrector) return pass<true, true, false>(step, c, u, g, b, count);
    return noisy ? pass<true, false, true>(step, c, u, g, b, count) : pass<true, false, false>(step, c, u, g, b, count);
  }
  if (step.corrector) return pass<false, true, false>(step, c, u, g, b, count);
  return noisy ? pass<false, false, true>(step, c, u, g, b, count) : pass<false, false, false>(step, c, u, g, b, count);
}

}  // namespace

SolverState::SolverState(std::size_t elements)
    : elements_(elements), previous_(elements, 0.0f), previous2_(elements, 0.0f), last_(elements, 0.0f) {}

bool SolverState::advance(const Step& step, const ModelOutput& output, const float* noise, float* latents,
                          float* denoised) {
  const Buffers buffers{step.n_noise != 0.0 ? noise : nullptr, latents, denoised, previous_.data(),
                        previous2_.data(), last_.data()};
  ++done_;
  const float poison = output.half ? dispatch<std::uint16_t>(step, output, buffers, elements_)
                                   : dispatch<float>(step, output, buffers, elements_);
  return poison == 0.0f;
}

void scale_input(const float* from, double scale, std::size_t count, void* to, bool half) {
  const auto factor = static_cast<float>(scale);
  if (half) {
    auto* out = static_cast<std::uint16_t*>(to);
    for (std::size_t i = 0; i < count; ++i) out[i] = float_to_half(from[i] * factor);
  } else {
    auto* out = static_cast<float*>(to);
    for (std::size_t i = 0; i < count; ++i) out[i] = from[i] * factor;
  }
}

}  // namespace pidiff
