#include "plugins/tensorrt/plugin.h"

#include <exception>
#include <stdexcept>

#include "kernels/attention_cuda.h"
#include "plugins/tensorrt/log.h"

namespace pidiff::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr const char* kInputs[] = {"q", "k", "v", "x", "a", "v_id", "mask", "scale"};
constexpr std::int32_t kRanks[] = {3, 3, 3, 3, 4, 4, 3, 1};
constexpr std::int64_t kMaxHeadDim = 160;  // of the kernels (attention_cuda.h)

bool is_supported(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

DType dtype_of(DataType type) {
  if (!is_supported(type))
    throw std::invalid_argument("q must be float32, float16 or bfloat16, got TensorRT's data type " +
                                std::to_string(static_cast<std::int32_t>(type)));
  return type == DataType::kFLOAT ? DType::float32 : type == DataType::kHALF ? DType::float16 : DType::bfloat16;
}

// Sizes that are not known yet are -1.
nodes::Shape shape_of(const nvinfer1::Dims& dims) { return nodes::Shape(dims.d, dims.d + dims.nbDims); }

void require_rank(std::int32_t input, const nodes::Shape& shape) {
  if (static_cast<std::int32_t>(shape.size()) != kRanks[input])
    throw std::invalid_argument(std::string(kInputs[input]) + " must have " + std::to_string(kRanks[input]) +
                                " axes, got " + nodes::text(shape));
}

void require_head_dim(std::int64_t channels, std::int64_t heads) {
  if (channels % heads != 0 || channels / heads > kMaxHeadDim)
    throw std::invalid_argument("num_heads must divide the channels into heads of at most " +
                                std::to_string(kMaxHeadDim) + ", got " + std::to_string(heads) + " for " +
                                std::to_string(channels) + " channels");
}

// Input tensors with their addresses, or with none.
std::array<nodes::Tensor, nodes::kIdentityInputs> tensors_of(const PluginTensorDesc* descs, const void* const* data,
                                                             std::int32_t count) {
  std::array<nodes::Tensor, nodes::kIdentityInputs> tensors;
  for (std::int32_t i = 0; i < count; ++i)
    tensors[static_cast<std::size_t>(i)] = {data == nullptr ? nullptr : data[i], shape_of(descs[i].dims)};
  return tensors;
}

}  // namespace

Plugin::Plugin(bool identity, const nodes::Attributes& attributes)
    : identity_(identity),
      attributes_(attributes),
      values_{static_cast<std::int32_t>(attributes.num_heads), static_cast<std::int32_t>(attributes.has_null),
              static_cast<std::int32_t>(attributes.residual)},
      field_{PluginField{"num_heads", &values_[0], PluginFieldType::kINT32, 1},
             PluginField{"has_null", &values_[1], PluginFieldType::kINT32, 1},
             PluginField{"residual", &values_[2], PluginFieldType::kINT32, 1}},
      fields_{identity ? 3 : 1, field_.data()} {
  if (attributes.num_heads < 1 || attributes.num_heads != values_[0])
    throw std::invalid_argument("num_heads must be 1 or more, got " + std::to_string(attributes.num_heads));
  for (const auto& [name, value] : {std::pair("has_null", attributes.has_null), {"residual", attributes.residual}})
    if (value != 0 && value != 1)
      throw std::invalid_argument(std::string(name) + " must be 0 or 1, got " + std::to_string(value));
  for (std::int32_t i = 0; i < fields_.nbFields; ++i)
    description_ += std::string(i == 0 ? "" : " ") + field_[static_cast<std::size_t>(i)].name + "=" +
                    std::to_string(values_[static_cast<std::size_t>(i)]);
}

// C++ exceptions must not leave TensorRT's calls: they become a message and a status.
template <class Body>
bool Plugin::guarded(const char* method, const Body& body) const noexcept {
  try {
    body();
    return true;
  } catch (const std::exception& error) {
    log_error(std::string(getPluginName()) + " " + method + ": " + error.what());
    return false;
  }
}

void Plugin::require_counts(std::int32_t given_inputs, std::int32_t given_outputs) const {
  if (given_inputs != inputs() || given_outputs != getNbOutputs())
    throw std::invalid_argument("inputs and outputs must be " + std::to_string(inputs()) + " and " +
                                std::to_string(getNbOutputs()) + ", got " + std::to_string(given_inputs) + " and " +
                                std::to_string(given_outputs));
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  Plugin* copy = nullptr;
  guarded("clone", [&] { copy = new Plugin(*this); });
  return copy;
}

std::int32_t Plugin::getOutputDataTypes(DataType* output_types, std::int32_t output_count, const DataType* input_types,
                                        std::int32_t input_count) const noexcept {
  return !guarded("getOutputDataTypes", [&] {
    require_counts(input_count, output_count);
    dtype_of(input_types[0]);
    for (std::int32_t i = 1; i < input_count; ++i)
      if (input_types[i] != input_types[0])
        throw std::invalid_argument(std::string(kInputs[i]) + " must have q's data type " +
                                    std::to_string(static_cast<std::int32_t>(input_types[0])) + ", got " +
                                    std::to_string(static_cast<std::int32_t>(input_types[i])));
    for (std::int32_t i = 0; i < output_count; ++i) output_types[i] = input_types[0];
  });
}

std::int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* input_dims, std::int32_t input_count,
                                     const nvinfer1::DimsExprs*, std::int32_t, nvinfer1::DimsExprs* output_dims,
                                     std::int32_t output_count, nvinfer1::IExprBuilder&) noexcept {
  return !guarded("getOutputShapes", [&] {
    require_counts(input_count, output_count);
    for (std::int32_t i = 0; i < input_count; ++i)
      require_rank(i, nodes::Shape(static_cast<std::size_t>(input_dims[i].nbDims), -1));
    output_dims[0] = input_dims[0];                 // out [B,S,C] as q
    if (identity_) output_dims[1] = input_dims[6];  // id_mass [B,P,S] as mask
  });
}

bool Plugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                       std::int32_t input_count, std::int32_t output_count) noexcept {
  if (position < 0 || position >= input_count + output_count) return false;
  const PluginTensorDesc& tensor = tensors[position].desc;
  return tensor.format == nvinfer1::TensorFormat::kLINEAR && is_supported(tensor.type) &&
         tensor.type == tensors[0].desc.type;
}

// What can be known before sizes are: a layer that can never run is refused when the engine is built.
std::int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* input_descs, std::int32_t input_count,
                                     const DynamicPluginTensorDesc*, std::int32_t output_count) noexcept {
  return !guarded("configurePlugin", [&] {
    require_counts(input_count, output_count);
    for (std::int32_t i = 0; i < input_count; ++i) require_rank(i, shape_of(input_descs[i].desc.dims));
    const std::int64_t channels = input_descs[0].desc.dims.d[2];
    if (channels >= 0) require_head_dim(channels, attributes_.num_heads);
  });
}

std::int32_t Plugin::onShapeChange(const PluginTensorDesc* input_descs, std::int32_t input_count,
                                   const PluginTensorDesc*, std::int32_t output_count) noexcept {
  return !guarded("onShapeChange", [&] {
    require_counts(input_count, output_count);
    const auto tensors = tensors_of(input_descs, nullptr, input_count);
    const AttentionParams text = nodes::attention_params(tensors.data(), attributes_, dtype_of(input_descs[0].type));
    require_head_dim(text.heads * text.head_dim, text.heads);
    if (identity_) nodes::identity_params(tensors.data(), attributes_, text);
  });
}

std::int32_t Plugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* data,
                             void* const* outputs, void*, cudaStream_t stream) noexcept {
  return !guarded("enqueue", [&] {
    const auto tensors = tensors_of(input_descs, data, inputs());
    AttentionParams text = nodes::attention_params(tensors.data(), attributes_, dtype_of(input_descs[0].type));
    text.out = outputs[0];
    attention_cuda(text, stream);
    if (!identity_) return;
    IdentityMixParams mix = nodes::identity_params(tensors.data(), attributes_, text);
    mix.id_mass = outputs[1];
    identity_mix_cuda(mix, stream);
  });
}

}  // namespace pidiff::trt
