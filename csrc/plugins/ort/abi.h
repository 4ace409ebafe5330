// The slice of ONNX Runtime's C ABI that our custom operators need, declared by slot.
//
// `OrtApi` is a table of function pointers to which releases only ever append, so an entry's position is its contract;
// asking the runtime for table version kApiVersion gives every entry used here. Declaring these few entries ourselves
// lets the library build where no ONNX Runtime headers are installed. tests/test_packaging.py compares every slot
// with the official header where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pidiff::ort {

constexpr std::uint32_t kApiVersion = 17;  // ONNX Runtime 1.17, the first with KernelContext_ParallelFor

// Opaque to us.
struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct TensorInfo;
using Table = void* const*;

struct ApiBase {
  Table (*get_api)(std::uint32_t version);
  const char* (*get_version_string)();
};

enum ElementType : int { kFloat = 1, kFloat16 = 10 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum Characteristic : int { kRequired = 0 };
enum MemoryType : int { kDefaultMemory = 0 };

// PIDIFF_ORT_SLOT(official name, our name, slot, return type, parameters)
#define PIDIFF_ORT_SLOTS(X)                                                                                        \
  X(CreateStatus, create_status, 0, Status*, (int code, const char* message))                                      \
  X(CreateCustomOpDomain, create_domain, 26, Status*, (const char* name, Domain** out))                            \
  X(CustomOpDomain_Add, domain_add, 27, Status*, (Domain * domain, const struct CustomOp* op))                     \
  X(AddCustomOpDomain, add_domain, 28, Status*, (SessionOptions * options, Domain * domain))                       \
  X(GetTensorMutableData, tensor_data, 51, Status*, (Value * value, void** out))                                   \
  X(GetDimensionsCount, dimensions_count, 61, Status*, (const TensorInfo* info, std::size_t* out))                 \
  X(GetDimensions, dimensions, 62, Status*, (const TensorInfo* info, std::int64_t* out, std::size_t count))        \
  X(GetTensorTypeAndShape, tensor_info, 65, Status*, (const Value* value, TensorInfo** out))                       \
  X(KernelInfoGetAttribute_int64, attribute_int, 86, Status*,                                                      \
    (const KernelInfo* info, const char* name, std::int64_t* out))                                                 \
  X(KernelContext_GetInput, input, 90, Status*, (const KernelContext* context, std::size_t index, const Value** out)) \
  X(KernelContext_GetOutput, output, 91, Status*,                                                                  \
    (KernelContext * context, std::size_t index, const std::int64_t* dims, std::size_t count, Value** out))        \
  X(ReleaseStatus, release_status, 93, void, (Status * status))                                                    \
  X(ReleaseTensorTypeAndShapeInfo, release_info, 99, void, (TensorInfo * info))                                    \
  X(KernelContext_GetGPUComputeStream, stream, 193, Status*, (const KernelContext* context, void** out))           \
  X(HasSessionConfigEntry, has_config, 237, Status*, (const SessionOptions* options, const char* key, int* out))    \
  X(GetSessionConfigEntry, get_config, 238, Status*,                                                               \
    (const SessionOptions* options, const char* key, char* value, std::size_t* size))                              \
  X(KernelContext_ParallelFor, parallel_for, 274, Status*,                                                         \
    (const KernelContext* context, void (*task)(void*, std::size_t), std::size_t total, std::size_t batches, void* user))

struct CustomOp;

// api.create_status(code, message) and so on.
struct Api {
  Table table;
#define PIDIFF_ORT_SLOT(official, name, slot, result, parameters) \
  template <class... Arguments>                                   \
  result name(Arguments... arguments) const {                     \
    using Function = result(*) parameters;                        \
    return reinterpret_cast<Function>(table[slot])(arguments...); \
  }
  PIDIFF_ORT_SLOTS(PIDIFF_ORT_SLOT)
#undef PIDIFF_ORT_SLOT
};

// OrtCustomOp as of version 17. `version` tells the runtime which members are there; it skips null optional ones.
struct CustomOp {
  std::uint32_t version;
  void* (*create_kernel)(const CustomOp*, Table, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider_type)(const CustomOp*);
  int (*get_input_type)(const CustomOp*, std::size_t);
  std::size_t (*get_input_type_count)(const CustomOp*);
  int (*get_output_type)(const CustomOp*, std::size_t);
  std::size_t (*get_output_type_count)(const CustomOp*);
  void (*kernel_compute)(void*, KernelContext*);
  void (*kernel_destroy)(void*);
  int (*get_input_characteristic)(const CustomOp*, std::size_t);
  int (*get_output_characteristic)(const CustomOp*, std::size_t);
  int (*get_input_memory_type)(const CustomOp*, std::size_t);
  int (*get_variadic_input_min_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, Table, const KernelInfo*, void**);
  Status* (*kernel_compute_v2)(void*, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
};

}  // namespace pidiff::ort
