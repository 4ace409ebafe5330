// The step loop's part on a GPU: its table of coefficients, and the launches before and after the model.
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "sampler/sample.h"
#include "sampler/solver.h"
#include "sampler/step_cuda.h"

namespace pidiff::bindings {
namespace {

// StepParams, member by member.
constexpr const char* kParams[] = {
    "table", "progress", "latents", "previous", "previous2", "last", "noise", "model_input", "model_output",
    "time_table", "time_row", "id_scales", "id_scale", "identity_map", "identity_sum",
    "steps", "elements", "time_elements", "rows", "map_elements",
    "input_bytes", "output_bytes", "time_bytes", "scale_bytes", "map_bytes"};
constexpr std::size_t kCount = sizeof(kParams) / sizeof(kParams[0]);
static_assert(sizeof(StepParams) == 8 * kCount, "a name for every member");

using Params = py::array_t<std::int64_t>;
using Bytes = py::array_t<std::uint8_t>;

Bytes step_table(const Schedule& schedule, double guidance_scale,
                 const std::optional<std::pair<std::int64_t, std::int64_t>>& guided_steps,
                 const std::vector<bool>& mapped_steps) {
  if (!std::isfinite(guidance_scale)) fail("guidance_scale must be finite, got " + std::to_string(guidance_scale));
  if (!mapped_steps.empty() && static_cast<std::int64_t>(mapped_steps.size()) != schedule.size())
    fail("mapped_steps must hold one value per step, " + std::to_string(schedule.size()) + ", got " +
         std::to_string(mapped_steps.size()));
  SampleRequest request;
  request.schedule = &schedule;
  request.guidance_scale = static_cast<float>(guidance_scale);
  if (guided_steps) std::tie(request.guided_from, request.guided_until) = *guided_steps;
  Bytes table({static_cast<py::ssize_t>(schedule.size()), static_cast<py::ssize_t>(sizeof(StepRow))});
  for (std::int64_t i = 0; i < schedule.size(); ++i) {
    const auto at = static_cast<std::size_t>(i);
    StepRow row = make_row(schedule.steps[at], request.guided(i), request.guidance_scale);
    row.maps = !mapped_steps.empty() && mapped_steps[at];
    std::memcpy(table.mutable_data(i, 0), &row, sizeof row);
  }
  return table;
}

StepParams parse_params(const Params& given) {
  require_shape(given, "params", {static_cast<py::ssize_t>(kCount)}, "[len(STEP_PARAMS)]");
  require_contiguous(given, "params");
  StepParams params;
  std::memcpy(&params, given.data(), sizeof params);
  return params;
}

void queue([[maybe_unused]] const StepParams& params, [[maybe_unused]] std::uintptr_t stream,
           [[maybe_unused]] bool output) {
#ifdef PIDIFF_HAS_CUDA
  const auto handle = reinterpret_cast<void*>(stream);
  return output ? queue_step_output(params, handle) : queue_step_input(params, handle);
#else
  throw std::runtime_error("the core must be built with CUDA for a step on the GPU, got a build without it");
#endif
}

}  // namespace

void bind_device(py::module_& m) {
  py::tuple names(kCount);
  for (std::size_t i = 0; i < kCount; ++i) names[i] = kParams[i];
  m.attr("STEP_PARAMS") = names;
  m.def("step_table", &step_table, py::arg("schedule"), py::arg("guidance_scale"), py::arg("guided_steps") = py::none(),
        py::arg("mapped_steps") = std::vector<bool>(),
        "The coefficients of all steps as the GPU reads them, uint8 [N, 64]. guided_steps: as in sample(). mapped_steps:\n"
        "for each step whether its identity map counts for the average (none given: none does).");
  m.def("queue_step_input", [](const Params& params, std::uintptr_t stream) { queue(parse_params(params), stream, false); },
        py::arg("params"), py::arg("stream"),
        "Queue what comes before the model on a CUDA stream (its handle): scaled latents, time row and id_scale of the\n"
        "step that the progress names. params int64 [len(STEP_PARAMS)]: addresses on the device and sizes, by\n"
        "STEP_PARAMS (csrc/sampler/step_cuda.h says what they are). RuntimeError without CUDA.");
  m.def("queue_step_output", [](const Params& params, std::uintptr_t stream) { queue(parse_params(params), stream, true); },
        py::arg("params"), py::arg("stream"),
        "Queue what comes after the model: guidance and the solver step, exactly as sample() does them, the identity\n"
        "map's sum, the first step whose latents are not finite, and the progress to the next step.");
}

}  // namespace pidiff::bindings
