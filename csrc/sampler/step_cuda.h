// A step of the loop on the GPU, around the model's run: one launch before it and one after it. Present when the build
// found nvcc (PIDIFF_HAS_CUDA); the table is made on the host and always there.
#pragma once

#include <cstdint>

#include "sampler/step_element.h"

namespace pidiff {

// Where the loop is. `next` is read before the model and written after it, `current` the other way round: so the two
// launches and the model, captured once, serve every step.
struct StepProgress {
  std::int32_t next, current;
  std::int32_t first_bad;  // the first step that left latents that are not finite; INT32_MAX while there is none
  std::int32_t unused;
};

// Device pointers (null: not there) and sizes. Batch rows of the model come in the order [conditional..., unconditional...],
// so that steps without guidance use the beginning of every buffer. *_bytes: 4 for float32 elements, 2 for float16.
// All members have 8 bytes: callers in other languages fill them as an array of 64-bit numbers.
struct StepParams {
  const StepRow* table;        // [steps]
  StepProgress* progress;
  float* latents;              // [elements], as are the next five
  float* previous;             // the clean prediction
  float* previous2;
  float* last;
  const float* noise;
  void* model_input;           // [elements], [2 * elements] where steps have guidance; model_output too
  const void* model_output;
  const void* time_table;      // [steps, time_elements]
  void* time_row;              // [time_elements]
  const void* id_scales;       // [steps]
  void* id_scale;              // [rows]
  const void* identity_map;    // [map_elements], the conditional rows; null: the model has none
  float* identity_sum;         // [map_elements]
  std::int64_t steps, elements, time_elements, rows, map_elements;
  std::int64_t input_bytes, output_bytes, time_bytes, scale_bytes, map_bytes;
};

// Asynchronous on `stream` (a cudaStream_t). Throws std::runtime_error.
void queue_step_input(const StepParams& params, void* stream);   // model_input, time_row, id_scale of step `next`
void queue_step_output(const StepParams& params, void* stream);  // latents after it, the map's sum; next = current + 1

}  // namespace pidiff
