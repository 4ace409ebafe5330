// TensorRT's side of a plug-in, for tests/test_tensorrt_plugin.py: compiled with TensorRT's headers, but there is no
// TensorRT. It opens the library by its two symbols, as IPluginRegistry::loadLibrary does, and calls the plug-in's
// interfaces in TensorRT's order. Statuses are the plug-in's own; -1: it gave an object that TensorRT could not use.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Logger final : ILogger {
  std::string messages;
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) messages += std::string(message) + "\n";
  }
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

// Sizes as TensorRT hands them to getOutputShapes: objects behind pointers, here constants with a number.
struct Constant final : apiv::VDimensionExpr {
  explicit Constant(std::int64_t v) : value(v) {}
  bool isConstant() const override { return true; }
  std::int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  std::int64_t value;
};
struct Size final : IDimensionExpr {
  explicit Size(std::int64_t value) : constant(value) { mImpl = &constant; }
  Constant constant;
};
struct Sizes final : apiv::VExprBuilder {
  std::deque<Size> made;
  const IDimensionExpr* constant(std::int64_t value) override { return &made.emplace_back(value); }
  const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  const IDimensionExpr* declareSizeTensor(std::int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
};
struct Builder final : IExprBuilder {
  Sizes sizes;
  Builder() { mImpl = &sizes; }
};

IPluginCreatorInterface* const* creators = nullptr;
std::int32_t creator_count = 0;

IPluginCreatorV3One* creator(const char* name) {
  for (std::int32_t i = 0; i < creator_count; ++i) {
    if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
    auto* found = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (std::strcmp(found->getPluginName(), name) == 0) return found;
  }
  return nullptr;
}

// The interfaces of a plug-in are found as TensorRT finds them, by their kind.
template <class Interface>
Interface* capability(void* plugin, PluginCapabilityType type, const char* kind) {
  IPluginCapability* found = static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type);
  if (found == nullptr || std::strcmp(found->getInterfaceInfo().kind, kind) != 0) return nullptr;
  return static_cast<Interface*>(found);
}
IPluginV3OneBuild* build_of(void* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD");
}
IPluginV3OneRuntime* runtime_of(void* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
}

std::vector<PluginTensorDesc> descs(int count, const int* types, const int* formats, const int* ranks,
                                    const std::int64_t* sizes) {
  std::vector<PluginTensorDesc> result(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    PluginTensorDesc& desc = result[static_cast<std::size_t>(i)];
    desc.type = static_cast<DataType>(types[i]);
    desc.format = formats == nullptr ? TensorFormat::kLINEAR : static_cast<TensorFormat>(formats[i]);
    desc.scale = 1.0f;
    desc.dims.nbDims = ranks == nullptr ? 0 : ranks[i];
    for (int axis = 0; axis < desc.dims.nbDims; ++axis) desc.dims.d[axis] = *sizes++;
  }
  return result;
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& given) {
  std::vector<DynamicPluginTensorDesc> result;
  for (const PluginTensorDesc& desc : given) result.push_back({desc, desc.dims, desc.dims, desc.dims});
  return result;
}

}  // namespace

extern "C" {

// 0, or why not. `listing`: one line for each creator.
const char* host_open(const char* path, char* listing) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return dlerror();
  auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(dlsym(library, "getCreators"));
  if (set == nullptr || get == nullptr) return "setLoggerFinder or getCreators is missing";
  set(&finder);
  creators = get(creator_count);
  std::string text;
  for (std::int32_t i = 0; i < creator_count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(creators[i]);
    text += std::string(one->getPluginNamespace()) + " " + one->getPluginName() + " " + one->getPluginVersion();
    const PluginFieldCollection* fields = one->getFieldNames();
    for (std::int32_t f = 0; f < fields->nbFields; ++f) text += std::string(" ") + fields->fields[f].name;
    text += "\n";
  }
  std::strcpy(listing, text.c_str());
  return nullptr;
}

// The error messages since the last call.
const char* host_messages() {
  static std::string taken;
  taken = logger.messages;
  logger.messages.clear();
  return taken.c_str();
}

// Field i has `types[i]` (PluginFieldType) and `values[i]`, stored as that type.
void* host_create(const char* name, int count, const char* const* names, const int* types, const std::int64_t* values) {
  std::deque<std::int32_t> small;
  std::vector<PluginField> fields;
  for (int i = 0; i < count; ++i) {
    const auto type = static_cast<PluginFieldType>(types[i]);
    const void* data = &values[i];
    if (type == PluginFieldType::kINT32) data = &small.emplace_back(static_cast<std::int32_t>(values[i]));
    fields.emplace_back(names[i], data, type, 1);
  }
  const PluginFieldCollection collection{count, fields.data()};
  IPluginCreatorV3One* found = creator(name);
  return found == nullptr ? nullptr : found->createPlugin("layer", &collection, TensorRTPhase::kBUILD);
}

// What an engine does: the fields are written, the plug-in goes, and another is made from what was written.
void* host_reload(void* plugin) {
  const PluginFieldCollection* given = runtime_of(plugin)->getFieldsToSerialize();
  std::deque<std::string> names, contents;
  std::vector<PluginField> fields;
  for (std::int32_t i = 0; i < given->nbFields; ++i) {
    const PluginField& field = given->fields[i];
    const std::size_t size = field.type == PluginFieldType::kINT32 ? 4 : 8;
    const auto* bytes = static_cast<const char*>(field.data);
    const std::string& content = contents.emplace_back(bytes, size * static_cast<std::size_t>(field.length));
    fields.emplace_back(names.emplace_back(field.name).c_str(), content.data(), field.type, field.length);
  }
  auto* core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
  const std::string name = core->getPluginName();
  delete static_cast<IPluginV3*>(plugin);
  const PluginFieldCollection collection{given->nbFields, fields.data()};
  return creator(name.c_str())->createPlugin("layer", &collection, TensorRTPhase::kRUNTIME);
}

void* host_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }
void host_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }
int host_outputs(void* plugin) { return build_of(plugin)->getNbOutputs(); }
const char* host_description(void* plugin) { return build_of(plugin)->getMetadataString(); }

int host_supports(void* plugin, int position, int inputs, int outputs, const int* types, const int* formats) {
  const auto given = dynamic(descs(inputs + outputs, types, formats, nullptr, nullptr));
  return build_of(plugin)->supportsFormatCombination(position, given.data(), inputs, outputs);
}

int host_types(void* plugin, int inputs, const int* types, int outputs, int* result) {
  std::vector<DataType> given, found(static_cast<std::size_t>(outputs));
  for (int i = 0; i < inputs; ++i) given.push_back(static_cast<DataType>(types[i]));
  const int status = build_of(plugin)->getOutputDataTypes(found.data(), outputs, given.data(), inputs);
  for (int i = 0; i < outputs; ++i) result[i] = static_cast<int>(found[static_cast<std::size_t>(i)]);
  return status;
}

// `result`: rank and sizes of each output.
int host_shapes(void* plugin, int inputs, const int* ranks, const std::int64_t* sizes, int outputs, std::int64_t* result) {
  Builder builder;
  std::vector<DimsExprs> given(static_cast<std::size_t>(inputs)), found(static_cast<std::size_t>(outputs));
  for (int i = 0; i < inputs; ++i) {
    given[static_cast<std::size_t>(i)].nbDims = ranks[i];
    for (int axis = 0; axis < ranks[i]; ++axis)
      given[static_cast<std::size_t>(i)].d[axis] = builder.constant(*sizes++);
  }
  const int status = build_of(plugin)->getOutputShapes(given.data(), inputs, nullptr, 0, found.data(), outputs, builder);
  if (status != 0) return status;
  for (const DimsExprs& dims : found) {
    *result++ = dims.nbDims;
    for (int axis = 0; axis < dims.nbDims; ++axis) *result++ = dims.d[axis]->getConstantValue();
  }
  return 0;
}

int host_configure(void* plugin, int inputs, int outputs, const int* types, const int* ranks, const std::int64_t* sizes) {
  const auto given = dynamic(descs(inputs + outputs, types, nullptr, ranks, sizes));
  if (build_of(plugin)->getWorkspaceSize(given.data(), inputs, given.data() + inputs, outputs) != 0) return -1;
  return build_of(plugin)->configurePlugin(given.data(), inputs, given.data() + inputs, outputs);
}

// An execution context: a clone is attached, told the shapes and run once.
int host_run(void* plugin, int inputs, int outputs, const int* types, const int* ranks, const std::int64_t* sizes,
             const void* const* data, void* const* results) {
  const auto given = descs(inputs + outputs, types, nullptr, ranks, sizes);
  IPluginV3* attached = runtime_of(plugin)->attachToContext(nullptr);
  if (attached == nullptr || attached == plugin) return -1;
  int status = runtime_of(attached)->onShapeChange(given.data(), inputs, given.data() + inputs, outputs);
  if (status == 0)
    status = runtime_of(attached)->enqueue(given.data(), given.data() + inputs, data, results, nullptr, nullptr);
  delete attached;
  return status;
}
}
