// Python's class of convolutions whose weights are packed.
#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.h"
#include "kernels/convolution.h"

namespace pidiff::bindings {
namespace {

Convolution make(const py::array& weight, const py::array& bias, const std::string& implementation) {
  const Implementation which = parse_implementation(implementation);
  require_shape(weight, "weight", {-1, -1, 3, 3}, "[O, C, 3, 3]");
  const std::int64_t out_channels = weight.shape(0), channels = weight.shape(1);
  if (out_channels < 1 || out_channels % Convolution::kOutChannels != 0 || channels < 1 || channels % Convolution::kChannels != 0)
    fail("weight must be of a multiple of 64 outputs and of 32 channels, got " + shape_of(weight));
  require_shape(bias, "bias", {weight.shape(0)}, "[O]");
  const float *values = float32_values(weight, "weight"), *offsets = float32_values(bias, "bias");
  py::gil_scoped_release release;
  return Convolution(values, offsets, out_channels, channels, own_threads(), which);
}

py::array apply(const Convolution& convolution, const py::array& x, const std::optional<py::array>& residual, bool upsample,
                const std::optional<py::array>& out, int threads) {
  require_shape(x, "x", {-1, -1, -1, static_cast<py::ssize_t>(convolution.channels())}, "[B, H, W, C]");
  require_contiguous(x, "x");
  if (!upsample && (x.shape(1) % 2 != 0 || x.shape(2) % 2 != 0)) fail("x must have an even height and width, got " + shape_of(x));
  if (threads < 0) fail("threads must not be negative, got " + std::to_string(threads));
  ConvolutionParams p;
  p.dtype = dtype_of(x, "x", true);
  if (p.dtype == DType::float16) fail("x must be float32 or bfloat16, got float16");
  p.upsampled = upsample ? 2 : 1;
  p.batch = x.shape(0);
  p.height = x.shape(1) * p.upsampled;
  p.width = x.shape(2) * p.upsampled;
  const auto check = [&](const py::array& a, const char* name) {
    require_shape(a, name, {p.batch, p.height, p.width, convolution.out_channels()}, "[B, H, W, O]");
    require_dtype(a, name, x, "x");
    require_contiguous(a, name);
  };
  if (residual) check(*residual, "residual");
  py::array result = out ? *out : empty(x.dtype(), {p.batch, p.height, p.width, convolution.out_channels()});
  check(result, "out");
  if (!result.writeable()) fail("out must be writable, got a read-only array");
  p.x = x.data();
  p.residual = residual ? residual->data() : nullptr;
  p.out = result.mutable_data();
  {
    py::gil_scoped_release release;
    convolution(p, own_threads(threads), threads > 0 ? threads : start_threads());
  }
  return result;
}

}  // namespace

void bind_convolution(py::module_& m) {
  py::class_<Convolution>(m, "Convolution",
                          "3 x 3 convolution, stride 1, padding 1, by Winograd's F(2 x 2, 3 x 3) (arXiv 1509.09308).\n\n"
                          "weight [O, C, 3, 3] and bias [O], float32; O a multiple of 64, C of 32. They are packed for the implementation:\n"
                          "\"reference\" (direct), one that computes in float32 (\"auto\" takes the last), \"avx512bf16\" or \"amx\", which\n"
                          "round what is multiplied to bfloat16, or \"low\", one of these two where that is faster than float32, else \"auto\".")
      .def(py::init(&make), py::arg("weight"), py::arg("bias"), py::arg("implementation") = "auto")
      .def("__call__", &apply, py::arg("x"), py::arg("residual") = py::none(), py::arg("upsample") = false, py::arg("out") = py::none(),
           py::arg("threads") = 0,
           "x [B, H, W, C], float32 or bfloat16 (ml_dtypes' or its bits as uint16), H and W even -> [B, H, W, O] in its dtype, plus\n"
           "residual, which has the same shape: `out` if given, which may be residual and not overlap x. upsample: x is\n"
           "[B, H / 2, W / 2, C], and every pixel of it four. threads: as in `attention`.")
      .def_property_readonly("implementation", [](const Convolution& c) { return name_of(c.implementation()); }, "The one that is used.");
}

}  // namespace pidiff::bindings
