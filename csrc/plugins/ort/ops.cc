// The nodes of plugins/nodes.h on the CPU and, in a build with CUDA kernels, for ONNX Runtime's CUDA provider. No maths here:
// tensors in, the kernels' structs filled, threads or the stream lent by ONNX Runtime.
#include "plugins/ort/ops.h"

#include <array>
#include <exception>
#include <stdexcept>
#include <string>

#include "plugins/nodes.h"
#ifdef PIDIFF_HAS_CUDA
#include "kernels/attention_cuda.h"
#endif

namespace pidiff::ort {
namespace {

using nodes::Shape;
using nodes::Tensor;

// A status that ONNX Runtime made, on its way back to it.
struct Failure {
  Status* status;
};
void check(Status* status) {
  if (status != nullptr) throw Failure{status};
}

// C++ exceptions must not cross the C ABI.
template <class Body>
Status* guarded(const Api& api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::invalid_argument& error) {
    return api.create_status(kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api.create_status(kFail, error.what());
  }
}

Tensor input(const Api& api, const KernelContext* context, std::size_t index) {
  const Value* value = nullptr;
  check(api.input(context, index, &value));
  if (value == nullptr) throw std::invalid_argument("input " + std::to_string(index) + " must be given, got none");
  TensorInfo* info = nullptr;
  check(api.tensor_info(value, &info));
  std::size_t rank = 0;
  Status* status = api.dimensions_count(info, &rank);
  Shape shape(rank);
  if (status == nullptr) status = api.dimensions(info, shape.data(), rank);
  api.release_info(info);
  check(status);
  void* data = nullptr;
  check(api.tensor_data(const_cast<Value*>(value), &data));
  return {data, shape};
}

void* output(const Api& api, KernelContext* context, std::size_t index, const Shape& shape) {
  Value* value = nullptr;
  check(api.output(context, index, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check(api.tensor_data(value, &data));
  return data;
}

struct Kernel {
  Api api;
  DType dtype;
  Implementation implementation;  // cuda: the tensors are device memory, and work is queued on the provider's stream
  nodes::Attributes attributes;
};

Parallel lent_threads(const Api& api, KernelContext* context) {
  // ParallelFor reports failure only for a null context, so its status is not carried out of the C callback.
  struct Lender {
    static void run(void* data, std::size_t count, Parallel::Task task, void* user) {
      const auto& lender = *static_cast<Lender*>(data);
      if (Status* status = lender.api.parallel_for(lender.context, task, count, std::size_t{0}, user))
        lender.api.release_status(status);
    }
    Api api;
    const KernelContext* context;
  };
  thread_local Lender lender;
  lender = {api, context};
  return {Lender::run, &lender};
}

template <std::size_t Count>
std::array<Tensor, Count> inputs_of(const Kernel& kernel, KernelContext* context) {
  std::array<Tensor, Count> inputs;
  for (std::size_t i = 0; i < Count; ++i) inputs[i] = input(kernel.api, context, i);
  return inputs;
}

// Runs one primitive where the kernel's tensors are: `host` or `device` (of attention.h or attention_cuda.h).
template <class Params, class Host, class Device>
void run(const Kernel& kernel, KernelContext* context, const Params& params, const Host& host, const Device& device) {
  if (kernel.implementation != Implementation::cuda)
    return host(params, lent_threads(kernel.api, context), kernel.implementation);
  void* stream = nullptr;
  check(kernel.api.stream(context, &stream));
  device(params, stream);
}

#ifndef PIDIFF_HAS_CUDA
// No operator asks for these in a build without CUDA.
void attention_cuda(const AttentionParams&, void*) {}
void identity_mix_cuda(const IdentityMixParams&, void*) {}
#endif

AttentionParams text_attention(const Kernel& kernel, KernelContext* context, const Tensor* inputs) {
  AttentionParams p = nodes::attention_params(inputs, kernel.attributes, kernel.dtype);
  p.out = output(kernel.api, context, 0, {p.batch, p.queries, p.heads * p.head_dim});
  return p;
}

void compute_attention(const Kernel& kernel, KernelContext* context) {
  const auto inputs = inputs_of<nodes::kAttentionInputs>(kernel, context);
  run(kernel, context, text_attention(kernel, context, inputs.data()), attention, attention_cuda);
}

void compute_identity_attention(const Kernel& kernel, KernelContext* context) {
  const auto inputs = inputs_of<nodes::kIdentityInputs>(kernel, context);
  const AttentionParams text = text_attention(kernel, context, inputs.data());
  IdentityMixParams p = nodes::identity_params(inputs.data(), kernel.attributes, text);
  p.id_mass = output(kernel.api, context, 1, {p.batch, p.people, p.queries});
  run(kernel, context, text, attention, attention_cuda);
  run(kernel, context, p, identity_mix, identity_mix_cuda);
}

// One operator for one element type; all it depends on is a template argument, so that the C callbacks need no state.
template <DType T>
constexpr int element_type = T == DType::float32 ? kFloat : kFloat16;

template <DType T, bool Identity, Implementation Way>
CustomOp make_op() {
  CustomOp op{};
  op.version = kApiVersion;
  op.get_name = [](const CustomOp*) { return Identity ? "IdentityAttention" : "Attention"; };
  op.get_execution_provider_type = [](const CustomOp*) -> const char* { 
    return Way == Implementation::cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.get_input_type = [](const CustomOp*, std::size_t) { return element_type<T>; };
  op.get_input_type_count = [](const CustomOp*) { return Identity ? nodes::kIdentityInputs : nodes::kAttentionInputs; };
  op.get_output_type = [](const CustomOp*, std::size_t) { return element_type<T>; };
  op.get_output_type_count = [](const CustomOp*) -> std::size_t { return Identity ? 2 : 1; };
  op.get_input_characteristic = [](const CustomOp*, std::size_t) -> int { return kRequired; };
  op.get_output_characteristic = [](const CustomOp*, std::size_t) -> int { return kRequired; };
  op.get_input_memory_type = [](const CustomOp*, std::size_t) -> int { return kDefaultMemory; };
  op.get_variadic_input_min_arity = [](const CustomOp*) { return 0; };
  op.get_variadic_input_homogeneity = [](const CustomOp*) { return 0; };
  op.get_variadic_output_min_arity = [](const CustomOp*) { return 0; };
  op.get_variadic_output_homogeneity = [](const CustomOp*) { return 0; };
  op.kernel_destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.create_kernel_v2 = [](const CustomOp*, Table table, const KernelInfo* info, void** out) -> Status* {
    const Api api{table};
    return guarded(api, [&] {
      Kernel kernel{api, T, Way, {}};
      check(api.attribute_int(info, "num_heads", &kernel.attributes.num_heads));
      if (Identity) {
        check(api.attribute_int(info, "has_null", &kernel.attributes.has_null));
        check(api.attribute_int(info, "residual", &kernel.attributes.residual));
      }
      *out = new Kernel(kernel);
    });
  };
  op.kernel_compute_v2 = [](void* data, KernelContext* context) -> Status* {
    const auto& kernel = *static_cast<Kernel*>(data);
    return guarded(kernel.api, [&] {
      Identity ? compute_identity_attention(kernel, context) : compute_attention(kernel, context);
    });
  };
  op.get_start_version = [](const CustomOp*) { return 1; };
  op.get_end_version = [](const CustomOp*) { return 1; };
  return op;
}

template <Implementation Way>
void append(std::vector<CustomOp>& ops) {
  ops.push_back(make_op<DType::float32, false, Way>());
  ops.push_back(make_op<DType::float16, false, Way>());
  ops.push_back(make_op<DType::float32, true, Way>());
  ops.push_back(make_op<DType::float16, true, Way>());
}

template <Implementation Way>
const std::vector<CustomOp>& ops_of() {
  static const std::vector<CustomOp> ops = [] {
    std::vector<CustomOp> made;
    append<Way>(made);
#ifdef PIDIFF_HAS_CUDA
    append<Implementation::cuda>(made);
#endif
    return made;
  }();
  return ops;
}

}  // namespace

const std::vector<CustomOp>& all_ops(bool low) {
  return low ? ops_of<Implementation::low_precision>() : ops_of<Implementation::automatic>();
}

}  // namespace pidiff::ort
