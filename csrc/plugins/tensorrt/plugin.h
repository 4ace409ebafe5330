// The nodes of plugins/nodes.h as TensorRT layers (IPluginV3), computed by the CUDA kernels. No maths here, and no call
// into libnvinfer: these classes only implement its interfaces, so the library is built from headers alone.
//
// Written for TensorRT 10.3 to 11 (JetPack 6 has 10.3). The tensors are contiguous and all of one type: float, half or
// bfloat16. Both outputs always exist; a graph may leave the second, id_mass, without a reader.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "plugins/nodes.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "the TensorRT headers must be those of version 10.3 or newer"
#endif

namespace pidiff::trt {

// How TensorRT finds them. The names are not those of the ONNX nodes: the ONNX parsers of TensorRT 10.14 and later take
// any node called Attention for their own, whatever its domain. export/plugin_nodes.py renames the nodes.
constexpr const char* kNamespace = "pidiff";
constexpr const char* kVersion = "1";
constexpr const char* name_of(bool identity) { return identity ? "PidiffIdentityAttention" : "PidiffAttention"; }


class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // identity: IdentityAttention, not Attention. Throws std::invalid_argument for attributes that no graph can have.
  Plugin(bool identity, const nodes::Attributes& attributes);
  Plugin(const Plugin& other) : Plugin(other.identity_, other.attributes_) {}
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return name_of(identity_); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  std::int32_t getNbOutputs() const noexcept override { return identity_ ? 2 : 1; }
  std::int32_t getOutputDataTypes(nvinfer1::DataType* output_types, std::int32_t outputs,
                                  const nvinfer1::DataType* input_types, std::int32_t inputs) const noexcept override;
  std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t input_count,
                               const nvinfer1::DimsExprs* shape_inputs, std::int32_t shape_input_count,
                               nvinfer1::DimsExprs* outputs, std::int32_t output_count,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 std::int32_t inputs, std::int32_t outputs) noexcept override;
  std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t input_count,
                               const nvinfer1::DynamicPluginTensorDesc* outputs,
                               std::int32_t output_count) noexcept override;
  // None: the text attention's result waits in the output for the identity term to be added in place.
  std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc*, std::int32_t,
                               const nvinfer1::DynamicPluginTensorDesc*, std::int32_t) const noexcept override {
    return 0;
  }
  const char* getTimingCacheID() noexcept override { return description_.c_str(); }
  const char* getMetadataString() noexcept override { return description_.c_str(); }

  std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t input_count,
                             const nvinfer1::PluginTensorDesc* outputs, std::int32_t output_count) noexcept override;
  std::int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_; }

 private:
  std::int32_t inputs() const {
    return static_cast<std::int32_t>(identity_ ? nodes::kIdentityInputs : nodes::kAttentionInputs);
  }
  void require_counts(std::int32_t inputs, std::int32_t outputs) const;
  template <class Body>
  bool guarded(const char* method, const Body& body) const noexcept;

  bool identity_;
  nodes::Attributes attributes_;
  std::string description_;
  // What is serialised; `fields_` points to both.
  std::array<std::int32_t, 3> values_;
  std::array<nvinfer1::PluginField, 3> field_;
  nvinfer1::PluginFieldCollection fields_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(bool identity);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return name_of(identity_); }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  bool identity_;
  std::array<nvinfer1::PluginField, 3> field_;
  nvinfer1::PluginFieldCollection fields_;
};

}  // namespace pidiff::trt
