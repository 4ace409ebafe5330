#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "plugins/tensorrt/log.h"
#include "plugins/tensorrt/plugin.h"

namespace pidiff::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// The ONNX parser hands an attribute over in 32 bits, and an engine our own fields; 64 bits are what ONNX has.
std::int64_t value_of(const PluginField& field) {
  const std::string name = field.name;
  if (field.length != 1 || field.data == nullptr)
    throw std::invalid_argument(name + " must be one number, got " + std::to_string(field.length));
  if (field.type == PluginFieldType::kINT32) {
    std::int32_t value;
    std::memcpy(&value, field.data, sizeof value);
    return value;
  }
  if (field.type == PluginFieldType::kINT64) {
    std::int64_t value;
    std::memcpy(&value, field.data, sizeof value);
    return value;
  }
  throw std::invalid_argument(name + " must be an integer, got a field of type " +
                              std::to_string(static_cast<std::int32_t>(field.type)));
}

// Each of the names once, and no others.
nodes::Attributes attributes_of(const nvinfer1::PluginFieldCollection& given,
                                const nvinfer1::PluginFieldCollection& names) {
  nodes::Attributes attributes;
  std::int64_t* const places[] = {&attributes.num_heads, &attributes.has_null, &attributes.residual};
  std::string missing, wanted;
  for (std::int32_t i = 0; i < names.nbFields; ++i) {
    const PluginField* found = nullptr;
    for (std::int32_t j = 0; j < given.nbFields; ++j)
      if (std::strcmp(given.fields[j].name, names.fields[i].name) == 0) found = &given.fields[j];
    if (found == nullptr)
      missing += std::string(missing.empty() ? "" : ", ") + names.fields[i].name;
    else
      *places[i] = value_of(*found);
    wanted += std::string(i == 0 ? "" : ", ") + names.fields[i].name;
  }
  if (!missing.empty()) throw std::invalid_argument("fields must include " + missing + ", got none");
  if (given.nbFields != names.nbFields)
    throw std::invalid_argument("fields must be " + wanted + ", got " + std::to_string(given.nbFields) + " of them");
  return attributes;
}

}  // namespace

Creator::Creator(bool identity)
    : identity_(identity),
      field_{PluginField{"num_heads", nullptr, PluginFieldType::kINT32, 1},
             PluginField{"has_null", nullptr, PluginFieldType::kINT32, 1},
             PluginField{"residual", nullptr, PluginFieldType::kINT32, 1}},
      fields_{identity ? 3 : 1, field_.data()} {}

nvinfer1::IPluginV3* Creator::createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  try {
    if (fields == nullptr) throw std::invalid_argument("fields must be given, got none");
    return new Plugin(identity_, attributes_of(*fields, fields_));
  } catch (const std::exception& error) {
    log_error(std::string(getPluginName()) + " " + (name == nullptr ? "" : name) + ": " + error.what());
    return nullptr;
  }
}

}  // namespace pidiff::trt
