// numpy arrays in and out, checked with one sentence per mistake.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "kernels/attention.h"

namespace pidiff::bindings {

namespace py = pybind11;

// "(2, 77, 320)"
inline std::string shape_of(const py::array& a) {
  std::string text = "(";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + ")";
}

[[noreturn]] inline void fail(const std::string& message) { throw py::value_error(message); }

// Throws unless `a` has exactly this shape; -1 stands for any size, and `meaning` is how the message writes it.
inline void require_shape(const py::array& a, const char* name, std::initializer_list<py::ssize_t> shape,
                          const char* meaning) {
  bool same = a.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t axis = 0;
  for (auto it = shape.begin(); same && it != shape.end(); ++it, ++axis) same = *it < 0 || *it == a.shape(axis);
  if (same) return;
  std::string wanted;
  for (auto size : shape) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? std::string("*") : std::to_string(size));
  fail(std::string(name) + " must have shape " + meaning + " = (" + wanted + "), got " + shape_of(a));
}

// numpy itself has no bfloat16: it comes as ml_dtypes' or as its bits.
inline DType dtype_of(const py::array& a, const char* name, bool bfloat16 = false) {
  const std::string text = py::str(a.dtype());
  if (text == "float32") return DType::float32;
  if (text == "float16") return DType::float16;
  if (bfloat16 && (text == "bfloat16" || text == "uint16")) return DType::bfloat16;
  fail(std::string(name) + " must be float32" + (bfloat16 ? ", float16 or bfloat16, got " : " or float16, got ") + text);
}

inline void require_dtype(const py::array& a, const char* name, const py::array& like, const char* like_name) {
  if (a.dtype().equal(like.dtype())) return;
  fail(std::string(name) + " must have the dtype of " + like_name + ", " + std::string(py::str(like.dtype())) +
       ", got " + std::string(py::str(a.dtype())));
}

inline bool is_contiguous(const py::array& a) { return (a.flags() & py::array::c_style) != 0; }

inline void require_contiguous(const py::array& a, const char* name) {
  if (!is_contiguous(a)) fail(std::string(name) + " must be C-contiguous, got strides of another layout");
}

inline const float* float32_values(const py::array& a, const char* name) {
  if (std::string(py::str(a.dtype())) != "float32") fail(std::string(name) + " must be float32, got " + std::string(py::str(a.dtype())));
  require_contiguous(a, name);
  return static_cast<const float*>(a.data());
}

// Stride of an axis in elements. The last axis must be contiguous; an axis of one element may have any stride.
inline std::int64_t stride(const py::array& a, const char* name, py::ssize_t axis) {
  const py::ssize_t last = a.ndim() - 1;
  if (a.shape(last) > 1 && a.strides(last) != a.itemsize())
    fail(std::string(name) + " must be contiguous along its last axis, got a stride of " +
         std::to_string(a.strides(last)) + " bytes for elements of " + std::to_string(a.itemsize()));
  if (a.strides(axis) % a.itemsize() != 0) fail(std::string(name) + " must be aligned to its elements, got odd strides");
  return a.strides(axis) / a.itemsize();
}

inline py::array empty(const py::dtype& dtype, std::vector<py::ssize_t> shape) {
  return py::array(dtype, std::move(shape));
}

}  // namespace pidiff::bindings
