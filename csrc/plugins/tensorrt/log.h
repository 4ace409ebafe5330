// Where the plug-in's messages go.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace pidiff::trt {

// TensorRT hands its finder over when it loads the library.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// An error, to the logger of the engine or builder that this thread works for; to stderr where there is none.
void log_error(const std::string& message) noexcept;

}  // namespace pidiff::trt
