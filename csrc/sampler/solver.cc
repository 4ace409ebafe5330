#include "sampler/solver.h"

#include "kernels/half.h"

namespace pidiff {
namespace {

inline float read(const float* from, std::size_t i) { return from[i]; }
inline float read(const std::uint16_t* from, std::size_t i) { return half_to_float(from[i]); }

struct Buffers {
  const float* noise;  // read by noisy steps only
  float *latents, *denoised, *previous, *previous2, *last;
};

// The one pass. Template flags take the untaken terms out of the loop.
template <bool Guided, bool Corrected, bool Noisy, class Element>
float pass(const StepRow& row, const Element* conditional, const Element* unconditional, const Buffers& b,
           std::size_t count) {
  float poison = 0.0f;  // 0 while everything is finite, NaN afterwards
  for (std::size_t i = 0; i < count; ++i) {
    StepElement e{b.latents[i], b.previous[i], b.previous2[i], b.last[i]};
    pidiff::advance(row, Guided, Corrected, Noisy, read(conditional, i), Guided ? read(unconditional, i) : 0.0f,
                    Noisy ? b.noise[i] : 0.0f, e);
    b.last[i] = e.last;
    b.previous2[i] = e.previous2;
    b.previous[i] = e.previous;
    b.denoised[i] = e.previous;
    b.latents[i] = e.latents;
    poison += e.latents * 0.0f;
  }
  return poison;
}

template <class Element>
float dispatch(const StepRow& row, const ModelOutput& output, const Buffers& b, std::size_t count) {
  const auto* c = static_cast<const Element*>(output.conditional);
  const auto* u = static_cast<const Element*>(output.unconditional);
  if (row.guided) {
    if (row.corrected) return pass<true, true, false>(row, c, u, b, count);
    return row.noisy ? pass<true, false, true>(row, c, u, b, count) : pass<true, false, false>(row, c, u, b, count);
  }
  if (row.corrected) return pass<false, true, false>(row, c, u, b, count);
  return row.noisy ? pass<false, false, true>(row, c, u, b, count) : pass<false, false, false>(row, c, u, b, count);
}

}  // namespace

StepRow make_row(const Step& step, bool guided, float guidance_scale) {
  const auto f = [](double value) { return static_cast<float>(value); };
  StepRow row{};
  row.input_scale = f(step.input_scale);
  row.d_sample = f(step.d_sample);
  row.d_output = f(step.d_output);
  row.c_last = f(step.c_last);
  row.c_prev = f(step.c_prev);
  row.c_prev2 = f(step.c_prev2);
  row.c_denoised = f(step.c_denoised);
  row.n_sample = f(step.n_sample);
  row.n_denoised = f(step.n_denoised);
  row.n_prev = f(step.n_prev);
  row.n_noise = f(step.n_noise);
  row.guidance_scale = guidance_scale;
  row.guided = guided;
  row.corrected = step.corrector;
  row.noisy = step.n_noise != 0.0;
  return row;
}

SolverState::SolverState(std::size_t elements)
    : elements_(elements), previous_(elements, 0.0f), previous2_(elements, 0.0f), last_(elements, 0.0f) {}

bool SolverState::advance(const Step& step, const ModelOutput& output, const float* noise, float* latents,
                          float* denoised) {
  const Buffers buffers{noise, latents, denoised, previous_.data(), previous2_.data(), last_.data()};
  const StepRow row = make_row(step, output.unconditional != nullptr, output.guidance_scale);
  ++done_;
  const float poison = output.half ? dispatch<std::uint16_t>(row, output, buffers, elements_)
                                   : dispatch<float>(row, output, buffers, elements_);
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
