// Python's convolution, and the packing of its weights.
#include "kernels/convolution.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/arrays.h"
#include "kernels/driver.h"

namespace pidiff::bindings {
namespace {

py::array pack(const py::array& weight, const std::string& implementation) {
  const Implementation which = parse_implementation(implementation);
  require_shape(weight, "weight", {-1, -1, 3, 3}, "[O, C, 3, 3]");
  const std::int64_t out_channels = weight.shape(0), channels = weight.shape(1);
  if (out_channels < 1 || out_channels % kConvolutionOutputs != 0 || channels < 1 || channels % kConvolutionChannels != 0)
    fail("weight must be of a multiple of 64 outputs and of 32 channels, got " + shape_of(weight));
  const float* values = float32_values(weight, "weight");
  const auto shape = packed_convolution_shape(out_channels, channels, which);
  auto memory = std::make_unique<Scratch>(shape[0] * shape[1] * shape[2] * shape[3]);
  float* packed = memory->get();
  {
    py::gil_scoped_release release;
    pack_convolution(values, out_channels, channels, packed, own_threads(), which);
  }
  const py::capsule owner(memory.release(), [](void* scratch) { delete static_cast<Scratch*>(scratch); });
  return py::array_t<float>(shape, packed, owner);
}

py::array apply(const py::array& x, const py::array& packed, const py::array& bias, const std::optional<py::array>& residual, bool upsample,
                const std::string& implementation, const std::optional<py::array>& out, int threads) {
  const Implementation which = parse_implementation(implementation);
  require_shape(x, "x", {-1, -1, -1, -1}, "[B, H, W, C]");
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
  p.channels = x.shape(3);
  require_shape(bias, "bias", {-1}, "[O]");
  p.bias = float32_values(bias, "bias");
  p.out_channels = bias.shape(0);
  const auto shape = packed_convolution_shape(p.out_channels, p.channels, which);
  require_shape(packed, "packed", {shape[0], shape[1], shape[2], shape[3]}, "of weights [O, C, 3, 3], packed for the implementation");
  p.weights = float32_values(packed, "packed");
  const auto check = [&](const py::array& a, const char* name) {
    require_shape(a, name, {p.batch, p.height, p.width, p.out_channels}, "[B, H, W, O]");
    require_dtype(a, name, x, "x");
    require_contiguous(a, name);
  };
  if (residual) check(*residual, "residual");
  py::array result = out ? *out : empty(x.dtype(), {p.batch, p.height, p.width, p.out_channels});
  check(result, "out");
  if (!result.writeable()) fail("out must be writable, got a read-only array");
  p.x = x.data();
  p.residual = residual ? residual->data() : nullptr;
  p.out = result.mutable_data();
  {
    py::gil_scoped_release release;
    convolution(p, own_threads(threads), threads > 0 ? threads : start_threads(), which);
  }
  return result;
}

}  // namespace

void bind_convolution(py::module_& m) {
  m.def("pack_convolution", &pack, py::arg("weight"), py::arg("implementation") = "auto",
        "weight [O, C, 3, 3], float32, O a multiple of 64, C of 32 -> the weights as `convolution` takes them, float32 [*, *, *, *].");
  m.def("convolution", &apply, py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("residual") = py::none(),
        py::arg("upsample") = false, py::arg("implementation") = "auto", py::arg("out") = py::none(), py::arg("threads") = 0,
        "3 x 3 convolution, stride 1, padding 1, by Winograd's F(2 x 2, 3 x 3) (arXiv 1509.09308).\n\n"
        "x [B, H, W, C], float32 or bfloat16 (ml_dtypes' or its bits as uint16), H and W even, packed of `pack_convolution` for the same\n"
        "implementation, bias [O] float32 -> [B, H, W, O] in x's dtype, plus residual, which has the same shape: `out` if given, which\n"
        "may be residual and not overlap x. upsample: x is [B, H / 2, W / 2, C], and every pixel of it four. threads: as in\n"
        "`attention`. implementation: \"reference\" (direct), one that computes in float32 (\"auto\" takes the last), \"avx512bf16\" or\n"
        "\"amx\", which round what is multiplied to bfloat16, or \"low\", one of these two where that is faster than float32, else\n"
        "\"auto\".");
}

}  // namespace pidiff::bindings
