// From a noise schedule to the coefficients of every step, one function per solver. The formulas are the published
// ones; the conventions (which timestep is "previous", what ends a schedule) are those of diffusers' schedulers, to
// which tests/test_sampling.py holds every step.
#include "sampler/schedule.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "sampler/timesteps.h"

namespace pidiff {
namespace {

template <class Enum>
struct Named {
  Enum value;
  const char* name;
};
constexpr Named<Solver> solvers[] = {
    {Solver::ddim, "ddim"},   {Solver::euler, "euler"}, {Solver::euler_ancestral, "euler_ancestral"},
    {Solver::dpmpp_2m, "dpmpp_2m"}, {Solver::unipc, "unipc"}, {Solver::lcm, "lcm"},
    {Solver::tcd, "tcd"}};
constexpr Named<Prediction> predictions[] = {{Prediction::epsilon, "epsilon"},
                                             {Prediction::v_prediction, "v_prediction"}};
constexpr Named<Spacing> spacings[] = {
    {Spacing::leading, "leading"}, {Spacing::trailing, "trailing"}, {Spacing::linspace, "linspace"}};
constexpr Named<FinalSigma> final_sigmas[] = {{FinalSigma::zero, "zero"}, {FinalSigma::sigma_min, "sigma_min"}};

template <class Enum, std::size_t N>
const char* find(const Named<Enum> (&table)[N], Enum value) {
  for (const auto& entry : table)
    if (entry.value == value) return entry.name;
  return "unknown";
}
template <class Enum, std::size_t N>
Enum parse(const Named<Enum> (&table)[N], const std::string& name, const char* argument) {
  std::string choices;
  for (const auto& entry : table) {
    if (name == entry.name) return entry.value;
    choices += (choices.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + choices + ", got " + name);
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Distilled to jump along the timesteps of its own training.
bool is_consistency(Solver solver) { return solver == Solver::lcm || solver == Solver::tcd; }

void validate(const ScheduleConfig& c) {
  const auto train = static_cast<std::int64_t>(c.alphas_cumprod.size());
  const auto got = [](std::int64_t value) { return ", got " + std::to_string(value); };
  require(train >= 2, "alphas_cumprod must have at least 2 values" + got(train));
  for (std::size_t i = 0; i < c.alphas_cumprod.size(); ++i) {
    const double a = c.alphas_cumprod[i];
    require(a >= 0.0 && a <= 1.0, "alphas_cumprod must lie in [0, 1], got " + std::to_string(a));
    require(i == 0 || a <= c.alphas_cumprod[i - 1], "alphas_cumprod must not increase, got a larger value at index " +
                                                        std::to_string(i));
  }
  require(c.alphas_cumprod.front() > 0.0, "alphas_cumprod must start above 0, got 0");
  require(c.num_inference_steps >= 1 && c.num_inference_steps <= train,
          "num_inference_steps must lie in [1, " + std::to_string(train) + "]" + got(c.num_inference_steps));
  require(c.steps_offset >= 0, "steps_offset must not be negative" + got(c.steps_offset));
  const bool karras = c.solver == Solver::euler || c.solver == Solver::dpmpp_2m || c.solver == Solver::unipc;
  require(karras || !c.use_karras_sigmas,
          std::string("use_karras_sigmas must be false for ") + name_of(c.solver) + ", got true");
  require(c.eta >= 0.0 && c.eta <= 1.0, "eta must lie in [0, 1], got " + std::to_string(c.eta));
  if (is_consistency(c.solver)) {
    require(c.original_inference_steps >= 1 && c.original_inference_steps <= train,
            "original_inference_steps must lie in [1, " + std::to_string(train) + "]" + got(c.original_inference_steps));
    require(c.num_inference_steps <= c.original_inference_steps,
            "num_inference_steps must not exceed original_inference_steps " +
                std::to_string(c.original_inference_steps) + got(c.num_inference_steps));
  }
}

double alpha_at(const Schedule& s, double timestep) {
  return s.config.alphas_cumprod[static_cast<std::size_t>(timestep)];
}

// D from (x, model output) where x = sqrt(a) x0 + sqrt(1 - a) eps. Salimans & Ho, arXiv 2202.00512.
void predict_x0(Step& step, Prediction prediction, double a) {
  const double signal = std::sqrt(a), noise = std::sqrt(1.0 - a);
  step.d_sample = prediction == Prediction::epsilon ? 1.0 / signal : signal;
  step.d_output = prediction == Prediction::epsilon ? -noise / signal : -noise;
}

// Song et al., arXiv 2010.02502, equation 12 with eta = 0: x' = sqrt(a') D + sqrt(1 - a') (x - sqrt(a) D) / sqrt(1 - a).
void ddim(Schedule& s) {
  const auto train = static_cast<std::int64_t>(s.config.alphas_cumprod.size());
  const std::int64_t stride = train / s.config.num_inference_steps;
  const double last = s.config.set_alpha_to_one ? 1.0 : s.config.alphas_cumprod[0];
  for (const double t : s.timesteps) {
    Step step;
    const double a = alpha_at(s, t), previous = t - static_cast<double>(stride);
    const double b = previous >= 0.0 ? alpha_at(s, previous) : last;
    predict_x0(step, s.config.prediction, a);
    step.n_sample = std::sqrt((1.0 - b) / (1.0 - a));
    step.n_denoised = std::sqrt(b) - step.n_sample * std::sqrt(a);
    s.steps.push_back(step);
  }
}

// Latents in the "variance exploding" scale: x = x0 + sigma eps; the model sees x / sqrt(sigma^2 + 1).
Step exploding_step(const Schedule& s, std::size_t i) {
  Step step;
  const double sigma = s.sigmas[i], variance = sigma * sigma + 1.0;
  step.input_scale = 1.0 / std::sqrt(variance);
  step.d_sample = s.config.prediction == Prediction::epsilon ? 1.0 : 1.0 / variance;
  step.d_output = s.config.prediction == Prediction::epsilon ? -sigma : -sigma / std::sqrt(variance);
  return step;
}

// Karras et al., arXiv 2206.00364, algorithm 1 without churn: x' = x + (x - D) / sigma * (sigma' - sigma).
void euler(Schedule& s) {
  for (std::size_t i = 0; i + 1 < s.sigmas.size(); ++i) {
    Step step = exploding_step(s, i);
    step.n_sample = s.sigmas[i + 1] / s.sigmas[i];
    step.n_denoised = 1.0 - step.n_sample;
    s.steps.push_back(step);
  }
}

// The same down to sigma_down, then noise up to sigma'.
void euler_ancestral(Schedule& s) {
  for (std::size_t i = 0; i + 1 < s.sigmas.size(); ++i) {
    Step step = exploding_step(s, i);
    const double from = s.sigmas[i], to = s.sigmas[i + 1];
    const double up = std::sqrt(std::max(0.0, to * to * (from * from - to * to))) / from;
    step.n_sample = std::sqrt(std::max(0.0, to * to - up * up)) / from;
    step.n_denoised = 1.0 - step.n_sample;
    step.n_noise = up;
    s.steps.push_back(step);
  }
}

// Latents in the "variance preserving" scale at a noise level: x = alpha x0 + sigma eps, lambda = log(alpha / sigma).
struct Level {
  double alpha, sigma, lambda;
  explicit Level(double ratio)
      : alpha(1.0 / std::sqrt(ratio * ratio + 1.0)), sigma(ratio * alpha), lambda(-std::log(ratio)) {}
};

Step preserving_step(const Schedule& s, std::size_t i) {
  Step step;
  const Level at(s.sigmas[i]);
  predict_x0(step, s.config.prediction, at.alpha * at.alpha);
  return step;
}

// Lu et al., DPM-Solver++(2M), arXiv 2211.01095, algorithm 2, midpoint form.
void dpmpp_2m(Schedule& s) {
  const std::size_t count = s.timesteps.size();
  for (std::size_t i = 0; i < count; ++i) {
    Step step = preserving_step(s, i);
    const Level from(s.sigmas[i]), to(s.sigmas[i + 1]);
    const double h = to.lambda - from.lambda;  // infinite when the schedule ends at zero noise
    const double gain = -to.alpha * std::expm1(-h);
    step.n_sample = to.sigma / from.sigma;
    step.n_denoised = gain;
    const bool last = i + 1 == count && (count < 15 || s.config.final_sigma == FinalSigma::zero);
    if (i > 0 && !last) {
      const double r = (from.lambda - Level(s.sigmas[i - 1]).lambda) / h;
      step.n_denoised += 0.5 * gain / r;
      step.n_prev = -0.5 * gain / r;
    }
    s.steps.push_back(step);
  }
}

// Zhao et al., UniPC, arXiv 2302.04867: B(h) = e^h - 1 ("bh2"), order 2, data prediction. Each step first corrects
// the latents that the step before predicted (UniC), then predicts (UniP).
void unipc(Schedule& s) {
  const std::size_t count = s.timesteps.size();
  std::size_t order = 0;  // of the step before
  for (std::size_t i = 0; i < count; ++i) {
    Step step = preserving_step(s, i);
    if (i > 0) {
      const Level from(s.sigmas[i - 1]), to(s.sigmas[i]);
      const double h = to.lambda - from.lambda, hh = -h;
      const double b_h = std::expm1(hh);
      // Weights of (D_prev2 - D_prev) / r and of (D - D_prev): solve the order conditions R rho = b.
      double rho_earlier = 0.0, rho_now = 0.5, r = 1.0;
      if (order == 2) {
        r = (Level(s.sigmas[i - 2]).lambda - from.lambda) / h;
        const double phi_2 = b_h / hh - 1.0, phi_3 = phi_2 / hh - 0.5;
        const double b1 = phi_2 / b_h, b2 = 2.0 * phi_3 / b_h;
        rho_earlier = (b2 - b1) / (r - 1.0);
        rho_now = b1 - rho_earlier;
      }
      const double gain = -to.alpha * b_h;
      step.corrector = true;
      step.c_last = to.sigma / from.sigma;
      step.c_prev = gain * (1.0 - rho_earlier / r - rho_now);
      step.c_prev2 = gain * rho_earlier / r;
      step.c_denoised = gain * rho_now;
    }
    order = std::min<std::size_t>({2, count - i, order + 1});
    const Level from(s.sigmas[i]), to(s.sigmas[i + 1]);
    const double h = to.lambda - from.lambda, gain = -to.alpha * std::expm1(-h);
    step.n_sample = to.sigma / from.sigma;
    step.n_denoised = gain;
    if (order == 2) {
      const double r = (Level(s.sigmas[i - 1]).lambda - from.lambda) / h;
      step.n_denoised -= 0.5 * gain / r;
      step.n_prev = 0.5 * gain / r;
    }
    s.steps.push_back(step);
  }
}

// Luo et al., latent consistency models, arXiv 2310.04378: x' = sqrt(a') f + sqrt(1 - a') noise with
// f = c_skip x + c_out D; the last step returns f.
void lcm(Schedule& s) {
  constexpr double data = 0.5;  // sigma_data
  for (std::size_t i = 0; i < s.timesteps.size(); ++i) {
    Step step;
    const double t = s.timesteps[i], scaled = t * s.config.timestep_scaling;
    predict_x0(step, s.config.prediction, alpha_at(s, t));
    const double skip = data * data / (scaled * scaled + data * data);
    const double out = scaled / std::sqrt(scaled * scaled + data * data);
    const bool last = i + 1 == s.timesteps.size();
    const double b = last ? 1.0 : alpha_at(s, s.timesteps[i + 1]);
    step.n_sample = std::sqrt(b) * skip;
    step.n_denoised = std::sqrt(b) * out;
    step.n_noise = std::sqrt(1.0 - b);
    s.steps.push_back(step);
  }
}

// Zheng et al., trajectory consistency distillation, arXiv 2402.19159, algorithm 4: down the trajectory to s = (1 - eta) t', then
// noise up to t'. The last step ends at timestep 0.
void tcd(Schedule& s) {
  for (std::size_t i = 0; i < s.timesteps.size(); ++i) {
    Step step;
    const double a = alpha_at(s, s.timesteps[i]);
    const double to = i + 1 < s.timesteps.size() ? s.timesteps[i + 1] : 0.0;
    // Rounded as diffusers does, in float32.
    const double down = alpha_at(s, std::floor(static_cast<float>(1.0 - s.config.eta) * static_cast<float>(to)));
    const double kept = alpha_at(s, to) / down;  // 1 where no noise is drawn
    predict_x0(step, s.config.prediction, a);
    const double noise = std::sqrt((1.0 - down) / (1.0 - a));
    step.n_sample = std::sqrt(kept) * noise;
    step.n_denoised = std::sqrt(kept) * (std::sqrt(down) - noise * std::sqrt(a));
    step.n_noise = std::sqrt(1.0 - kept);
    s.steps.push_back(step);
  }
}

// Timesteps and sigmas; sigmas are rounded to float32, in which models and other samplers hold them.
void place(Schedule& s) {
  const ScheduleConfig& c = s.config;
  s.timesteps = is_consistency(c.solver) ? consistency_timesteps(c) : spaced_timesteps(c);
  const double largest = static_cast<double>(c.alphas_cumprod.size() - 1);
  for (double& t : s.timesteps)
    require(t >= 0.0 && t <= largest, "steps_offset must leave every timestep below " +
                                          std::to_string(c.alphas_cumprod.size()) + ", got timestep " +
                                          std::to_string(static_cast<std::int64_t>(t)));
  const std::vector<double> training = training_sigmas(c.alphas_cumprod);
  if (c.use_karras_sigmas) {
    // euler keeps the range that its timesteps span, the multistep solvers take the whole training range.
    const bool spanned = c.solver == Solver::euler;
    const double high = spanned ? interpolate(training, s.timesteps.front()) : training.back();
    const double low = spanned ? interpolate(training, s.timesteps.back()) : training.front();
    s.sigmas = karras_sigmas(high, low, static_cast<std::int64_t>(s.timesteps.size()));
    for (std::size_t i = 0; i < s.timesteps.size(); ++i) {
      const double t = timestep_of(s.sigmas[i], training);
      s.timesteps[i] = spanned ? t : std::nearbyint(t);
    }
  } else {
    for (const double t : s.timesteps) s.sigmas.push_back(interpolate(training, t));
  }
  const double smallest = c.solver == Solver::unipc && c.use_karras_sigmas ? s.sigmas.back() : training.front();
  s.sigmas.push_back(c.final_sigma == FinalSigma::zero ? 0.0 : smallest);
  for (double& sigma : s.sigmas) sigma = static_cast<double>(static_cast<float>(sigma));
  for (double& t : s.timesteps) t = static_cast<double>(static_cast<float>(t));
}

}  // namespace

const char* name_of(Solver solver) { return find(solvers, solver); }
const char* name_of(Prediction prediction) { return find(predictions, prediction); }
const char* name_of(Spacing spacing) { return find(spacings, spacing); }
Solver parse_solver(const std::string& name) { return parse(solvers, name, "solver"); }
Prediction parse_prediction(const std::string& name) { return parse(predictions, name, "prediction_type"); }
Spacing parse_spacing(const std::string& name) { return parse(spacings, name, "timestep_spacing"); }
FinalSigma parse_final_sigma(const std::string& name) { return parse(final_sigmas, name, "final_sigmas_type"); }

Schedule::Schedule(ScheduleConfig given) : config(std::move(given)) {
  validate(config);
  place(*this);
  if (config.solver == Solver::euler || config.solver == Solver::euler_ancestral) {
    const double top = *std::max_element(sigmas.begin(), sigmas.end());
    init_noise_sigma = config.spacing == Spacing::leading ? std::sqrt(top * top + 1.0) : top;
  }
  switch (config.solver) {
    case Solver::ddim: ddim(*this); break;
    case Solver::euler: euler(*this); break;
    case Solver::euler_ancestral: euler_ancestral(*this); break;
    case Solver::dpmpp_2m: dpmpp_2m(*this); break;
    case Solver::unipc: unipc(*this); break;
    case Solver::lcm: lcm(*this); break;
    case Solver::tcd: tcd(*this); break;
  }
}

}  // namespace pidiff
