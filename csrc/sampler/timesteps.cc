#include "sampler/timesteps.h"

#include <algorithm>
#include <cmath>

namespace pidiff {

std::vector<double> spaced_timesteps(const ScheduleConfig& config) {
  const auto train = static_cast<std::int64_t>(config.alphas_cumprod.size());
  const std::int64_t count = config.num_inference_steps;
  const bool multistep = config.solver == Solver::dpmpp_2m || config.solver == Solver::unipc;
  const bool continuous = config.solver == Solver::euler || config.solver == Solver::euler_ancestral;
  // Multistep solvers space one point more and leave out timestep 0, which the final sigma stands for.
  const std::int64_t points = multistep ? count + 1 : count;
  std::vector<double> result(count);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t from_end = points - 1 - i;
    double t = 0.0;
    switch (config.spacing) {
      case Spacing::linspace:
        t = points > 1 ? static_cast<double>(train - 1) / static_cast<double>(points - 1) * from_end : 0.0;
        t = continuous ? static_cast<double>(static_cast<float>(t)) : std::nearbyint(t);
        if (from_end == points - 1 && points > 1) t = static_cast<double>(train - 1);
        break;
      case Spacing::leading:
        t = static_cast<double>(from_end * (train / points) + config.steps_offset);
        break;
      case Spacing::trailing:
        t = std::nearbyint(static_cast<double>(train) - static_cast<double>(i) * (static_cast<double>(train) / count)) -
            1.0;
        break;
    }
    result[i] = t;
  }
  return result;
}

std::vector<double> consistency_timesteps(const ScheduleConfig& config) {
  const auto train = static_cast<std::int64_t>(config.alphas_cumprod.size());
  const std::int64_t original = config.original_inference_steps, skip = train / original;
  std::vector<double> result(config.num_inference_steps);
  for (std::int64_t i = 0; i < config.num_inference_steps; ++i) {
    const double position = static_cast<double>(original) / static_cast<double>(config.num_inference_steps) * i;
    const auto index = static_cast<std::int64_t>(std::floor(position));
    result[i] = static_cast<double>((original - index) * skip - 1);
  }
  return result;
}

std::vector<double> training_sigmas(const std::vector<double>& alphas_cumprod) {
  std::vector<double> sigmas(alphas_cumprod.size());
  for (std::size_t i = 0; i < sigmas.size(); ++i) {
    const double a = alphas_cumprod[i] > 0.0 ? alphas_cumprod[i] : 0x1p-24;
    sigmas[i] = std::sqrt((1.0 - a) / a);
  }
  return sigmas;
}

double interpolate(const std::vector<double>& values, double index) {
  const double last = static_cast<double>(values.size() - 1);
  if (!(index > 0.0)) return values.front();
  if (index >= last) return values.back();
  const auto low = static_cast<std::size_t>(index);
  return values[low] + (index - static_cast<double>(low)) * (values[low + 1] - values[low]);
}

std::vector<double> karras_sigmas(double largest, double smallest, std::int64_t count) {
  constexpr double rho = 7.0;
  const double from = std::pow(largest, 1.0 / rho), to = std::pow(smallest, 1.0 / rho);
  std::vector<double> result(count);
  for (std::int64_t i = 0; i < count; ++i) {
    const double ramp = count > 1 ? static_cast<double>(i) / static_cast<double>(count - 1) : 0.0;
    result[i] = std::pow(from + ramp * (to - from), rho);
  }
  return result;
}

double timestep_of(double sigma, const std::vector<double>& sigmas) {
  const double log_sigma = std::log(std::max(sigma, 1e-10));
  std::size_t low = 0;
  while (low + 2 < sigmas.size() && std::log(sigmas[low + 1]) <= log_sigma) ++low;
  const double a = std::log(sigmas[low]), b = std::log(sigmas[low + 1]);
  const double weight = std::clamp((a - log_sigma) / (a - b), 0.0, 1.0);
  return static_cast<double>(low) + weight;
}

}  // namespace pidiff
