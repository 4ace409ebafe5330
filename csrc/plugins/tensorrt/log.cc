#include "plugins/tensorrt/log.h"

#include <atomic>
#include <cstdio>

namespace pidiff::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* given) noexcept { finder = given; }

void log_error(const std::string& message) noexcept {
  nvinfer1::ILoggerFinder* const found = finder;
  nvinfer1::ILogger* const logger = found == nullptr ? nullptr : found->findLogger();
  if (logger == nullptr)
    std::fprintf(stderr, "%s\n", message.c_str());
  else
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
}

}  // namespace pidiff::trt
