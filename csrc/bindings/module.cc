// pidiff._C: the C++ core for Python. The only folder that includes pybind11.
#include <pybind11/pybind11.h>

namespace pidiff::bindings {
void bind_device(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);
void bind_convolution(pybind11::module_& m);
void bind_sampler(pybind11::module_& m);
}  // namespace pidiff::bindings

PYBIND11_MODULE(_C, m) {
  m.doc() = "PIDiff's C++ core: attention kernels, noise, solvers and the denoising loop.";
  pidiff::bindings::bind_kernels(m);
  pidiff::bindings::bind_convolution(m);
  pidiff::bindings::bind_sampler(m);
  pidiff::bindings::bind_device(m);
}
