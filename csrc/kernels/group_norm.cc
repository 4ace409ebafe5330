// Validation and the split of `group_norm` into tasks: sums of blocks of rows, then the rows.
#include "kernels/group_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/attention_cpu.h"
#include "kernels/driver.h"

namespace pidiff {
namespace {

constexpr std::int64_t kBlockElements = 64 * 1024;

// What becomes of one picture's channels: x * factor + offset. sums [blocks, 2, channels] of x - pivot, pivot [channels].
void factors(const GroupNormParams& p, std::int64_t batch, const float* pivot, const float* sums, std::int64_t blocks, float* factor,
             float* offset) {
  const std::int64_t width = p.channels / p.groups;
  const double rows = static_cast<double>(p.rows);
  std::vector<double> mean(width), shift(width);
  for (std::int64_t first = 0; first < p.channels; first += width) {
    double group_mean = 0.0, square = 0.0;
    for (std::int64_t i = 0; i < width; ++i) {
      const std::int64_t c = first + i;
      double sum = 0.0, squares = 0.0;
      for (std::int64_t block = 0; block < blocks; ++block) {
        sum += sums[block * 2 * p.channels + c];
        squares += sums[(block * 2 + 1) * p.channels + c];
      }
      shift[i] = p.shift == nullptr ? 0.0 : element(p.shift, (p.shifts == 1 ? 0 : batch) * p.channels + c, p.dtype);
      mean[i] = pivot[c] + sum / rows + shift[i];
      square += squares - sum * sum / rows;
      group_mean += mean[i] / static_cast<double>(width);
    }
    for (const double one : mean) square += rows * (one - group_mean) * (one - group_mean);
    const double scale = 1.0 / std::sqrt(std::max(square, 0.0) / (rows * static_cast<double>(width)) + p.epsilon);
    for (std::int64_t i = 0; i < width; ++i) {
      const double by = scale * p.weight[first + i];
      factor[first + i] = static_cast<float>(by);
      offset[first + i] = static_cast<float>((shift[i] - group_mean) * by + p.bias[first + i]);
    }
  }
}

}  // namespace

void group_norm(const GroupNormParams& p, const Parallel& pool, Implementation wanted) {
  check(p.batch >= 0 && p.rows >= 0, "batch and rows must not be negative");
  check(p.groups > 0 && p.channels > 0 && p.channels % p.groups == 0, "channels must be a positive multiple of groups");
  check(p.shift == nullptr || p.shifts == 1 || p.shifts == p.batch, "shifts must be 1 or batch");
  const bool choose = wanted == Implementation::automatic || wanted == Implementation::low_precision;
  const Implementation implementation = choose ? cpu_implementations().back() : wanted;
  if (p.batch == 0 || p.rows == 0) return;
  if (implementation == Implementation::reference) return group_norm_reference(p);
  const CpuKernels& kernels = require_kernels(implementation);
  const std::int64_t block = std::max<std::int64_t>(kBlockElements / p.channels, 1), blocks = (p.rows + block - 1) / block;
  const auto run = [&](const auto& task) {
    run_tasks(pool, p.batch * blocks, kNormLines * p.channels, [&](std::int64_t index, float* lines) {
      const std::int64_t batch = index / blocks, row = index % blocks * block;
      task(batch, batch * p.rows + row, std::min(block, p.rows - row), index, lines);
    });
  };
  // A picture's first row, so that sums of squares do not lose a small variance beside a large mean.
  std::vector<float> pivot(p.batch * p.channels), sums(p.batch * blocks * 2 * p.channels), factor(pivot.size()), offset(pivot.size());
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t c = 0; c < p.channels; ++c) pivot[b * p.channels + c] = element(p.x, b * p.rows * p.channels + c, p.dtype);
  run([&](std::int64_t batch, std::int64_t first, std::int64_t rows, std::int64_t index, float* lines) {
    kernels.norm_sums(p, &pivot[batch * p.channels], first, rows, &sums[index * 2 * p.channels], lines);
  });
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int64_t at = b * p.channels;
    factors(p, b, &pivot[at], &sums[at * blocks * 2], blocks, &factor[at], &offset[at]);
  }
  run([&](std::int64_t batch, std::int64_t first, std::int64_t rows, std::int64_t, float* lines) {
    kernels.norm_rows(p, &factor[batch * p.channels], &offset[batch * p.channels], first, rows, lines);
  });
}

}  // namespace pidiff
