// libpidiff_trt.so: what IPluginRegistry::loadLibrary looks for.
#include <cstdint>

#include "plugins/tensorrt/log.h"
#include "plugins/tensorrt/plugin.h"

extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  pidiff::trt::set_logger_finder(finder);
}

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  static pidiff::trt::Creator attention(false), identity_attention(true);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&attention, &identity_attention};
  count = 2;
  return creators;
}
}
