// Python's convolution, and the packing of its weights.
#include "kernels/convolution.h"

#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/arrays.h"
#include "kernels/driver.h"

namespace pidiff::bindings {
namespace {

bool parse_method(const std::string& method) {
  if (method == "winograd") return true;
  if (method == "direct") return false;
  fail("method must be winograd or direct, got " + method);
}

py::array pack(const py::array& weight, const std::string& implementation, const std::string& method) {
  const Implementation which = parse_implementation(implementation);
  const bool winograd = parse_method(method);
  if (winograd)
    require_shape(weight, "weight", {-1, -1, 3, 3}, "[O, C, 3, 3]");
  else
    require_shape(weight, "weight", {-1, -1, -1, -1}, "[O, C, K, K]");
  const std::int64_t out_channels = weight.shape(0), channels = weight.shape(1), kernel = weight.shape(2);
  if (kernel != weight.shape(3) || (kernel != 1 && kernel != 3)) fail("weight must be 1 x 1 or 3 x 3, got " + shape_of(weight));
  if (out_channels < 1 || out_channels % kConvolutionOutputs != 0 || channels < 1 || channels % kConvolutionChannels != 0)
    fail("weight must be of a multiple of 64 outputs and of 32 channels, got " + shape_of(weight));
  const float* values = float32_values(weight, "weight");
  const auto shape = packed_convolution_shape(out_channels, channels, kernel, winograd, which);
  auto memory = std::make_unique<Scratch>(shape[0] * shape[1] * shape[2] * shape[3]);
  float* packed = memory->get();
  {
    py::gil_scoped_release release;
    pack_convolution(values, out_channels, channels, kernel, winograd, packed, own_threads(), which);
  }
  const py::capsule owner(memory.release(), [](void* scratch) { delete static_cast<Scratch*>(scratch); });
  return py::array_t<float>(shape, packed, owner);
}

// What weights were packed for, by their shape.
void read_packed(const py::array& packed, Implementation which, ConvolutionParams& p) {
  require_shape(packed, "packed", {-1, -1, -1, -1}, "[*, *, *, *]");
  for (const auto& [kernel, winograd] : {std::pair<std::int64_t, bool>{3, true}, {3, false}, {1, false}}) {
    const auto shape = packed_convolution_shape(p.out_channels, p.channels, kernel, winograd, which);
    if (!std::equal(shape.begin(), shape.end(), packed.shape())) continue;
    p.kernel = kernel;
    p.winograd = winograd && which != Implementation::reference;
    p.weights = float32_values(packed, "packed");
    return;
  }
  fail("packed must be of weights [O, C, 3, 3] or [O, C, 1, 1], packed for the implementation, got " + shape_of(packed));
}

py::array apply(const py::array& x, const py::array& packed, const py::array& bias, const std::optional<py::array>& residual, bool upsample,
                int stride, const std::string& implementation, const std::optional<py::array>& out, int threads) {
  const Implementation which = parse_implementation(implementation);
  require_shape(x, "x", {-1, -1, -1, -1}, "[B, H, W, C]");
  require_contiguous(x, "x");
  if (stride != 1 && stride != 2) fail("stride must be 1 or 2, got " + std::to_string(stride));
  if (threads < 0) fail("threads must not be negative, got " + std::to_string(threads));
  ConvolutionParams p;
  p.dtype = dtype_of(x, "x", true);
  if (p.dtype == DType::float16) fail("x must be float32 or bfloat16, got float16");
  p.stride = stride;
  p.upsampled = upsample ? 2 : 1;
  p.batch = x.shape(0);
  p.height = x.shape(1) * p.upsampled / stride;
  p.width = x.shape(2) * p.upsampled / stride;
  p.channels = x.shape(3);
  require_shape(bias, "bias", {-1}, "[O]");
  p.bias = float32_values(bias, "bias");
  p.out_channels = bias.shape(0);
  read_packed(packed, which, p);
  if (p.winograd && stride == 2) fail("stride must be 1 by Winograd's way, got 2");
  if ((p.winograd || stride == 2) && !upsample && (x.shape(1) % 2 != 0 || x.shape(2) % 2 != 0))
    fail("x must have an even height and width, got " + shape_of(x));
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
  m.def("pack_convolution", &pack, py::arg("weight"), py::arg("implementation") = "auto", py::arg("method") = "winograd",
        "weight [O, C, K, K], float32, O a multiple of 64, C of 32, K 3 or 1 -> the weights as `convolution` takes them, float32 [*, *, *, *].\n\n"
        "method: \"winograd\" (K 3, stride 1, even sides) by F(2 x 2, 3 x 3) (arXiv 1509.09308), or \"direct\".");
  m.def("convolution", &apply, py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("residual") = py::none(),
        py::arg("upsample") = false, py::arg("stride") = 1, py::arg("implementation") = "auto", py::arg("out") = py::none(), py::arg("threads") = 0,
        "3 x 3 convolution with padding 1, or 1 x 1.\n\n"
        "x [B, H, W, C], float32 or bfloat16 (ml_dtypes' or its bits as uint16), packed of `pack_convolution` for the same implementation, bias\n"
        "[O] float32 -> [B, H, W, O] in x's dtype, plus residual, which has the same shape: `out` if given, which may be residual and not\n"
        "overlap x. H and W are even by Winograd's way and with a stride of 2. upsample: x is [B, H / 2, W / 2, C], and every pixel of it\n"
        "four. stride: 2 for [B, H / 2, W / 2, O]. threads: as in `attention`. implementation: \"reference\" (clear loops), one that\n"
        "computes in float32 (\"auto\" takes the last), \"avx512bf16\" or \"amx\", which round what is multiplied to bfloat16, or \"low\",\n"
        "one of these two where that is faster than float32, else \"auto\".");
}

}  // namespace pidiff::bindings
