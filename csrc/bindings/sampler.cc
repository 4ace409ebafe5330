#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "bindings/arrays.h"
#include "sampler/noise.h"
#include "sampler/sample.h"
#include "sampler/schedule.h"
#include "sampler/solver.h"

namespace pidiff::bindings {
namespace {

using FloatArray = py::array_t<float>;

using Seeds = py::typing::Iterable<py::int_>;

std::vector<std::uint64_t> parse_seeds(const Seeds& seeds) {
  std::vector<std::uint64_t> result;
  for (const py::handle item : seeds) {
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
    if (!number) throw py::error_already_set();
    result.push_back(PyLong_AsUnsignedLongLong(number.ptr()));
    if (PyErr_Occurred() == nullptr) continue;
    PyErr_Clear();
    fail("seeds must lie in [0, 2**64), got " + std::string(py::str(number)));
  }
  return result;
}

FloatArray py_randn(const Seeds& seeds_given, const std::tuple<py::ssize_t, py::ssize_t, py::ssize_t>& shape,
                    std::uint64_t stream) {
  const auto [c, h, w] = shape;
  if (c < 1 || h < 1 || w < 1)
    fail("shape must hold positive sizes (c, h, w), got (" + std::to_string(c) + ", " + std::to_string(h) + ", " +
         std::to_string(w) + ")");
  const std::vector<std::uint64_t> seeds = parse_seeds(seeds_given);
  FloatArray out({static_cast<py::ssize_t>(seeds.size()), c, h, w});
  float* to = out.mutable_data();
  const auto count = static_cast<std::size_t>(c * h * w);
  py::gil_scoped_release release;
  for (std::size_t i = 0; i < seeds.size(); ++i) normal(seeds[i], stream, to + i * count, count);
  return out;
}

FloatArray floats(const std::vector<double>& values) {
  FloatArray out(static_cast<py::ssize_t>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) out.mutable_at(static_cast<py::ssize_t>(i)) = static_cast<float>(values[i]);
  return out;
}

void bind_schedule(py::module_& m) {
  py::class_<Schedule>(m, "Schedule",
                       "The timesteps, noise levels and solver coefficients of one generation. Immutable.\n\n"
                       "alphas_cumprod: float64, one per training timestep. Raises ValueError for impossible values.")
      .def(py::init([](const std::string& solver, const std::vector<double>& alphas_cumprod, std::int64_t steps,
                       const std::string& prediction_type, const std::string& timestep_spacing,
                       std::int64_t steps_offset, bool use_karras_sigmas, const std::string& final_sigmas_type,
                       bool set_alpha_to_one, std::int64_t original_inference_steps, double timestep_scaling, double eta) {
             ScheduleConfig c;
             c.solver = parse_solver(solver);
             c.alphas_cumprod = alphas_cumprod;
             c.num_inference_steps = steps;
             c.prediction = parse_prediction(prediction_type);
             c.spacing = parse_spacing(timestep_spacing);
             c.steps_offset = steps_offset;
             c.use_karras_sigmas = use_karras_sigmas;
             c.final_sigma = parse_final_sigma(final_sigmas_type);
             c.set_alpha_to_one = set_alpha_to_one;
             c.original_inference_steps = original_inference_steps;
             c.timestep_scaling = timestep_scaling;
             c.eta = eta;
             return Schedule(std::move(c));
           }),
           py::arg("solver"), py::arg("alphas_cumprod"), py::arg("num_inference_steps"),
           py::arg("prediction_type") = "epsilon", py::arg("timestep_spacing") = "leading",
           py::arg("steps_offset") = 0, py::arg("use_karras_sigmas") = false, py::arg("final_sigmas_type") = "zero",
           py::arg("set_alpha_to_one") = true, py::arg("original_inference_steps") = 50,
           py::arg("timestep_scaling") = 10.0, py::arg("eta") = 0.3)
      .def_property_readonly("solver", [](const Schedule& s) { return name_of(s.config.solver); })
      .def_property_readonly("prediction_type", [](const Schedule& s) { return name_of(s.config.prediction); })
      .def_property_readonly("timestep_spacing", [](const Schedule& s) { return name_of(s.config.spacing); })
      .def_property_readonly("timesteps", [](const Schedule& s) { return floats(s.timesteps); },
                             "float32 [N]: what the model is conditioned on.")
      .def_property_readonly("sigmas", [](const Schedule& s) { return floats(s.sigmas); },
                             "float32 [N + 1]: sqrt((1 - a) / a) per step, then where the schedule ends.")
      .def_readonly("init_noise_sigma", &Schedule::init_noise_sigma, "The first latents are this times unit noise.")
      .def_property_readonly("needs_noise", [](const Schedule& s) {
            for (const Step& step : s.steps)
              if (step.n_noise != 0.0) return true;
            return false;
          }, "Whether steps draw fresh noise (euler_ancestral, lcm, tcd).")
      .def("__len__", &Schedule::size)
      .def("__repr__", [](const Schedule& s) {
        return std::string("Schedule(") + name_of(s.config.solver) + ", " + std::to_string(s.size()) + " steps, " +
               name_of(s.config.prediction) + ")";
      });
}

const Step& step_at(const Schedule& s, std::int64_t i) {
  if (i < 0 || i >= s.size())
    fail("step must lie in [0, " + std::to_string(s.size()) + "), got " + std::to_string(i));
  return s.steps[static_cast<std::size_t>(i)];
}

// One solver stepped by hand: for tests and for loops of one's own.
class PySolver {
 public:
  explicit PySolver(const Schedule& schedule) : schedule_(schedule), state_(0) {}

  FloatArray scale_model_input(std::int64_t i, const FloatArray& latents) const {
    const Step& step = step_at(schedule_, i);
    require_contiguous(latents, "latents");
    FloatArray out(shape(latents));
    scale_input(latents.data(), step.input_scale, static_cast<std::size_t>(latents.size()), out.mutable_data(), false);
    return out;
  }

  std::pair<FloatArray, FloatArray> step(std::int64_t i, const FloatArray& model_output, const FloatArray& latents,
                                         const std::optional<FloatArray>& noise) {
    const Step& step = step_at(schedule_, i);
    const auto count = static_cast<std::size_t>(latents.size());
    require_contiguous(latents, "latents");
    require_same(model_output, "model_output", latents);
    if (noise) require_same(*noise, "noise", latents);
    if (step.n_noise != 0.0 && !noise)
      fail(std::string("noise must be given for ") + name_of(schedule_.config.solver) + ", got None");
    if (i == 0) state_ = SolverState(count);
    if (i != state_.done()) fail("step must follow " + std::to_string(state_.done() - 1) + ", got " + std::to_string(i));
    if (state_.elements() != count) fail("latents must keep their shape between steps, got " + shape_of(latents));
    FloatArray next(shape(latents)), denoised(shape(latents));
    std::copy(latents.data(), latents.data() + count, next.mutable_data());
    ModelOutput output;
    output.conditional = model_output.data();
    state_.advance(step, output, noise ? noise->data() : nullptr, next.mutable_data(), denoised.mutable_data());
    return {next, denoised};
  }

 private:
  static std::vector<py::ssize_t> shape(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }
  static void require_same(const FloatArray& a, const char* name, const FloatArray& latents) {
    require_contiguous(a, name);
    if (shape(a) != shape(latents))
      fail(std::string(name) + " must have the shape of latents, " + shape_of(latents) + ", got " + shape_of(a));
  }

  Schedule schedule_;
  SolverState state_;
};

void bind_solver(py::module_& m) {
  py::class_<PySolver>(m, "Solver", "Steps a Schedule by hand: step 0 starts afresh, then 1, 2, ... in order.")
      .def(py::init<const Schedule&>(), py::arg("schedule"))
      .def("scale_model_input", &PySolver::scale_model_input, py::arg("step"), py::arg("latents"),
           "What the model is given for these latents at this step.")
      .def("step", &PySolver::step, py::arg("step"), py::arg("model_output"), py::arg("latents"),
           py::arg("noise") = py::none(),
           "Returns (the next latents, the clean prediction); float32 arrays of one shape throughout.");
}

void require_buffer(const py::array& a, const char* name, py::ssize_t rows, const py::array& latents) {
  require_shape(a, name, {rows, latents.shape(1), latents.shape(2), latents.shape(3)}, "[M, c, h, w]");
  require_contiguous(a, name);
  dtype_of(a, name);
}

void py_sample(const Schedule& schedule, const py::array& latents, const Seeds& seeds_given,
               double guidance_scale, const py::array& model_input, const py::array& model_output,
               const py::object& call_engine, const py::object& on_step,
               const std::optional<std::pair<std::int64_t, std::int64_t>>& guided_steps) {
  const std::vector<std::uint64_t> seeds = parse_seeds(seeds_given);
  const auto guidance = static_cast<float>(guidance_scale);
  require_shape(latents, "latents", {-1, -1, -1, -1}, "[B, c, h, w]");
  require_contiguous(latents, "latents");
  if (dtype_of(latents, "latents") != DType::float32) fail("latents must be float32, got float16");
  if (!latents.writeable()) fail("latents must be writeable, got a read-only array");
  if (!model_input.writeable()) fail("model_input must be writeable, got a read-only array");
  if (static_cast<py::ssize_t>(seeds.size()) != latents.shape(0))
    fail("seeds must hold one seed per image, " + std::to_string(latents.shape(0)) + ", got " +
         std::to_string(seeds.size()));
  if (!std::isfinite(guidance)) fail("guidance_scale must be finite, got " + std::to_string(guidance_scale));
  SampleRequest request;
  request.schedule = &schedule;
  request.guidance_scale = guidance;
  if (guided_steps) std::tie(request.guided_from, request.guided_until) = *guided_steps;
  const py::ssize_t rows = request.any_guided() ? 2 * latents.shape(0) : latents.shape(0);
  require_buffer(model_input, "model_input", rows, latents);
  require_buffer(model_output, "model_output", rows, latents);
  if (!PyCallable_Check(call_engine.ptr())) fail("call_engine must be callable, got " + std::string(py::repr(call_engine)));
  if (!on_step.is_none() && !PyCallable_Check(on_step.ptr()))
    fail("on_step must be callable or None, got " + std::string(py::repr(on_step)));

  FloatArray denoised({latents.shape(0), latents.shape(1), latents.shape(2), latents.shape(3)});
  request.seeds = seeds;
  request.image_elements = static_cast<std::size_t>(latents.shape(1) * latents.shape(2) * latents.shape(3));
  request.latents = static_cast<float*>(const_cast<void*>(latents.data()));
  request.denoised = denoised.mutable_data();
  request.model_input = const_cast<void*>(model_input.data());
  request.model_output = model_output.data();
  request.half_input = dtype_of(model_input, "model_input") == DType::float16;
  request.half_output = dtype_of(model_output, "model_output") == DType::float16;

  // A Python exception (KeyboardInterrupt included) leaves through the loop as a C++ one.
  const auto engine = [&](std::int64_t step) {
    py::gil_scoped_acquire acquire;
    call_engine(step);
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
  std::function<bool(std::int64_t)> progress;
  if (!on_step.is_none())
    progress = [&](std::int64_t step) {
      py::gil_scoped_acquire acquire;
      const py::object answer = on_step(step, latents, denoised);
      return static_cast<bool>(py::bool_(answer));
    };
  py::gil_scoped_release release;
  sample(request, engine, progress);
}

}  // namespace

void bind_sampler(py::module_& m) {
  py::setattr(py::register_exception<Cancelled>(m, "Cancelled"), "__doc__", py::str("on_step asked sample() to stop."));
  m.def("randn", &py_randn, py::arg("seeds"), py::arg("shape"), py::arg("stream") = 0,
        "Gaussian noise, float32 [len(seeds), c, h, w]. Each image depends on its own seed, the stream and the\n"
        "position within it, never on the batch (Philox4x32-10).");
  bind_schedule(m);
  bind_solver(m);
  m.def("sample", &py_sample, py::arg("schedule"), py::arg("latents"), py::arg("seeds"), py::arg("guidance_scale"),
        py::arg("model_input"), py::arg("model_output"), py::arg("call_engine"), py::arg("on_step") = py::none(),
        py::arg("guided_steps") = py::none(),
        "The denoising loop. latents float32 [B, c, h, w], already times init_noise_sigma, are advanced in place.\n\n"
        "Per step: writes the scaled latents to model_input [M, c, h, w] (M = 2B: unconditional rows, then conditional\n"
        "ones; M = B where no step has guidance), calls call_engine(step), which must fill model_output [M, c, h, w]\n"
        "(either buffer float32 or float16), then does guidance and the solver step in one pass, then calls\n"
        "on_step(step, latents, denoised): True stops with Cancelled. Both arrays are reused: copy what you keep.\n"
        "guided_steps (first, end): steps with guidance, first <= step < end (None: all of them, where guidance_scale is\n"
        "not 1). At every other step only the last B rows of both buffers are written and read.\n"
        "Runs without the GIL but for the callbacks. RuntimeError names the step at which latents are not finite.");
}

}  // namespace pidiff::bindings
