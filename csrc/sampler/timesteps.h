// Which timesteps and noise levels a schedule visits (the first half of making a Schedule).
#pragma once

#include "sampler/schedule.h"

namespace pidiff {

// Timesteps for ddim, euler and euler_ancestral (N points) or dpmpp_2m and unipc (N of N + 1 points).
// "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2, arXiv 2305.08891.
std::vector<double> spaced_timesteps(const ScheduleConfig& config);

// Timesteps of a consistency model (lcm, arXiv 2310.04378; tcd, 2402.19159): a subset of its distillation's own.
std::vector<double> consistency_timesteps(const ScheduleConfig& config);

// sqrt((1 - a) / a) per training timestep; a zero `a` (zero terminal SNR) counts as 2^-24, so that it stays finite.
std::vector<double> training_sigmas(const std::vector<double>& alphas_cumprod);

// Value at a fractional index, clamped at the ends.
double interpolate(const std::vector<double>& values, double index);

// "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5, rho = 7.
std::vector<double> karras_sigmas(double largest, double smallest, std::int64_t count);

// The fractional training timestep whose log sigma this is.
double timestep_of(double sigma, const std::vector<double>& sigmas);

}  // namespace pidiff
