// Both launches of a step: a thread per element, and no more in a thread than its element's part of every array.
#pragma once

#include "kernels/cuda_device.cuh"
#include "sampler/step_cuda.h"

namespace pidiff::cuda {

constexpr int kStepThreads = 256;

PIDIFF_DEVICE std::int64_t step_index() { return block_x() * kStepThreads + thread_index(); }

PIDIFF_DEVICE float load_as(const void* from, std::int64_t i, std::int64_t bytes) {
  return bytes == 2 ? to_float(static_cast<const Half*>(from)[i]) : static_cast<const float*>(from)[i];
}

PIDIFF_DEVICE void store_as(void* to, std::int64_t i, std::int64_t bytes, float value) {
  if (bytes == 2) {
    static_cast<Half*>(to)[i] = from_float<Half>(value);
  } else {
    static_cast<float*>(to)[i] = value;
  }
}

// to[i] = from[j], elements of 2 or 4 bytes as they are.
PIDIFF_DEVICE void copy_element(void* to, std::int64_t i, const void* from, std::int64_t j, std::int64_t bytes) {
  if (bytes == 2) {
    static_cast<std::uint16_t*>(to)[i] = static_cast<const std::uint16_t*>(from)[j];
  } else {
    static_cast<std::uint32_t*>(to)[i] = static_cast<const std::uint32_t*>(from)[j];
  }
}

PIDIFF_KERNEL void step_input(StepParams p) {
  const std::int64_t i = step_index(), step = p.progress->next;
  if (i == 0) p.progress->current = static_cast<std::int32_t>(step);
  if (step >= p.steps) return;
  const StepRow& row = p.table[step];
  if (i < p.elements) {
    const float value = p.latents[i] * row.input_scale;
    store_as(p.model_input, i, p.input_bytes, value);
    if (row.guided) store_as(p.model_input, p.elements + i, p.input_bytes, value);
  }
  if (i < p.time_elements) copy_element(p.time_row, i, p.time_table, step * p.time_elements + i, p.time_bytes);
  if (i < p.rows) copy_element(p.id_scale, i, p.id_scales, step, p.scale_bytes);
}

PIDIFF_KERNEL void step_output(StepParams p) {
  const std::int64_t i = step_index(), step = p.progress->current;
  if (step >= p.steps) return;
  if (i == 0) p.progress->next = static_cast<std::int32_t>(step) + 1;
  const StepRow& row = p.table[step];
  if (i < p.elements) {
    StepElement e{p.latents[i], p.previous[i], p.previous2[i], p.last[i]};
    advance(row, row.guided != 0, row.corrected != 0, row.noisy != 0, load_as(p.model_output, i, p.output_bytes),
            row.guided ? load_as(p.model_output, p.elements + i, p.output_bytes) : 0.0f,
            row.noisy ? p.noise[i] : 0.0f, e);
    p.latents[i] = e.latents;
    p.previous[i] = e.previous;
    p.previous2[i] = e.previous2;
    p.last[i] = e.last;
    if (!(e.latents * 0.0f == 0.0f)) keep_smallest(&p.progress->first_bad, static_cast<std::int32_t>(step));
  }
  if (row.maps && i < p.map_elements) p.identity_sum[i] += load_as(p.identity_map, i, p.map_bytes);
}

}  // namespace pidiff::cuda
