// A schedule is a value: the timesteps of one generation and, per step, the few numbers its solver needs.
//
// Every solver here is linear in (latents, prediction, earlier predictions, noise). So a solver is a function that
// turns a noise schedule into a list of Steps, computed once in float64; running a step is one pass over the data
// (solver.h) that knows no solver by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pidiff {

enum class Solver : std::uint8_t { ddim, euler, euler_ancestral, dpmpp_2m, unipc, lcm, tcd };
enum class Prediction : std::uint8_t { epsilon, v_prediction };
enum class Spacing : std::uint8_t { leading, trailing, linspace };
enum class FinalSigma : std::uint8_t { zero, sigma_min };

struct ScheduleConfig {
  Solver solver = Solver::ddim;
  std::vector<double> alphas_cumprod;  // one per training timestep, in [0, 1], not increasing
  std::int64_t num_inference_steps = 20;
  Prediction prediction = Prediction::epsilon;
  Spacing spacing = Spacing::leading;
  std::int64_t steps_offset = 0;
  bool use_karras_sigmas = false;       // euler, dpmpp_2m, unipc
  FinalSigma final_sigma = FinalSigma::zero;  // euler, dpmpp_2m, unipc
  bool set_alpha_to_one = true;         // ddim: what stands behind the last step
  std::int64_t original_inference_steps = 50;  // lcm, tcd
  double timestep_scaling = 10.0;       // lcm
  double eta = 0.3;                     // tcd: 0 draws no noise, 1 nothing but noise (the paper's gamma)
};

// With D = the predicted clean latents (x0), all coefficients of one step:
//   model input = input_scale * x
//   D   = d_sample * x + d_output * model_output
//   x_c = c_last * x_last + c_prev * D_prev + c_prev2 * D_prev2 + c_denoised * D     (corrector; else x_c = x)
//   x'  = n_sample * x_c + n_denoised * D + n_prev * D_prev + n_noise * noise
// x_last is the x_c of the step before.
struct Step {
  double input_scale = 1.0;
  double d_sample = 0.0, d_output = 0.0;
  bool corrector = false;
  double c_last = 0.0, c_prev = 0.0, c_prev2 = 0.0, c_denoised = 0.0;
  double n_sample = 0.0, n_denoised = 0.0, n_prev = 0.0, n_noise = 0.0;
};

struct Schedule {
  ScheduleConfig config;
  std::vector<double> timesteps;  // [N], what the model is conditioned on; fractional for Karras sigmas with euler
  std::vector<double> sigmas;     // [N + 1], sqrt((1 - a) / a), float32 values; the last is where the schedule ends
  double init_noise_sigma = 1.0;  // the first latents are this times unit noise
  std::vector<Step> steps;        // [N]

  // Throws std::invalid_argument with one sentence.
  explicit Schedule(ScheduleConfig config);
  std::int64_t size() const { return static_cast<std::int64_t>(steps.size()); }
};

const char* name_of(Solver solver);
const char* name_of(Prediction prediction);
const char* name_of(Spacing spacing);
Solver parse_solver(const std::string& name);
Prediction parse_prediction(const std::string& name);
Spacing parse_spacing(const std::string& name);
FinalSigma parse_final_sigma(const std::string& name);

}  // namespace pidiff
