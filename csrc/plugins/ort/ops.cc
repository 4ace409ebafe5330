// ONNX domain `pidiff`, version 1, on the CPU and, in a build with CUDA kernels, for ONNX Runtime's CUDA provider. No
// maths here: tensors in, the kernels' structs filled, threads or the stream lent by ONNX Runtime.
//
//   Attention(q [B,S,C], k [B,T,C], v [B,T,C]; num_heads) -> out [B,S,C]
//   IdentityAttention(q [B,S,C], k [B,T,C], v [B,T,C], x [B,S,C], a [B,P,C,H*T'], v_id [B,P,T_id,C], mask [B,P,S],
//                     scale [B]; num_heads, has_null, residual) -> out [B,S,C], id_mass [B,P,S]
#include "plugins/ort/ops.h"

#include <cmath>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/attention.h"
#ifdef PIDIFF_HAS_CUDA
#include "kernels/attention_cuda.h"
#endif

namespace pidiff::ort {
namespace {

using Shape = std::vector<std::int64_t>;

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

std::string text(const Shape& shape) {
  std::string result = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
  return result + ")";
}

struct Tensor {
  const void* data;
  Shape shape;
};

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

void require(const Tensor& tensor, const char* name, const Shape& shape) {
  if (tensor.shape != shape)
    throw std::invalid_argument(std::string(name) + " must have shape " + text(shape) + ", got " + text(tensor.shape));
}
void require_rank(const Tensor& tensor, const char* name, std::size_t rank) {
  if (tensor.shape.size() != rank)
    throw std::invalid_argument(std::string(name) + " must have " + std::to_string(rank) + " axes, got " +
                                text(tensor.shape));
}

struct Kernel {
  Api api;
  DType dtype;
  Implementation implementation;  // cuda: the tensors are device memory, and work is queued on the provider's stream
  std::int64_t num_heads = 0, has_null = 0, residual = 0;
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

AttentionParams text_attention(const Kernel& kernel, KernelContext* context) {
  const Tensor q = input(kernel.api, context, 0), k = input(kernel.api, context, 1), v = input(kernel.api, context, 2);
  require_rank(q, "q", 3);
  require_rank(k, "k", 3);
  const std::int64_t batch = q.shape[0], queries = q.shape[1], channels = q.shape[2], keys = k.shape[1];
  require(k, "k", {batch, keys, channels});
  require(v, "v", {batch, keys, channels});
  if (kernel.num_heads < 1 || channels % kernel.num_heads != 0)
    throw std::invalid_argument("num_heads must divide the channels " + std::to_string(channels) + ", got " +
                                std::to_string(kernel.num_heads));
  AttentionParams p;
  p.q = q.data;
  p.k = k.data;
  p.v = v.data;
  p.batch = batch;
  p.queries = queries;
  p.keys = keys;
  p.heads = kernel.num_heads;
  p.head_dim = channels / kernel.num_heads;
  p.q_stride = p.out_stride = {queries * channels, channels, p.head_dim};
  p.k_stride = p.v_stride = {keys * channels, channels, p.head_dim};
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  p.dtype = kernel.dtype;
  p.out = output(kernel.api, context, 0, {batch, queries, channels});
  return p;
}

void compute_attention(const Kernel& kernel, KernelContext* context) {
  run(kernel, context, text_attention(kernel, context), attention, attention_cuda);
}

void compute_identity_attention(const Kernel& kernel, KernelContext* context) {
  const AttentionParams text = text_attention(kernel, context);
  const std::int64_t batch = text.batch, queries = text.queries, channels = text.heads * text.head_dim;
  const Tensor x = input(kernel.api, context, 3), a = input(kernel.api, context, 4);
  const Tensor v_id = input(kernel.api, context, 5), mask = input(kernel.api, context, 6);
  const Tensor scale = input(kernel.api, context, 7);
  require_rank(v_id, "v_id", 4);
  IdentityMixParams p;
  p.people = v_id.shape[1];
  p.tokens = v_id.shape[2];
  p.has_null = kernel.has_null != 0;
  p.heads = kernel.num_heads;
  require(v_id, "v_id", {batch, p.people, p.tokens, channels});
  require(a, "a", {batch, p.people, channels, p.heads * p.columns()});
  require(mask, "mask", {batch, p.people, queries});
  require(scale, "scale", {batch});
  if (kernel.residual == 0) require(x, "x", {batch, queries, channels});
  p.h = text.out;  // in place: identity_mix reads a row before it writes it
  p.y = kernel.residual != 0 ? text.out : x.data;
  p.a = a.data;
  p.v = v_id.data;
  p.mask = mask.data;
  p.id_scale = scale.data;
  p.out = text.out;
  p.id_mass = output(kernel.api, context, 1, {batch, p.people, queries});
  p.batch = batch;
  p.queries = queries;
  p.channels = channels;
  p.h_stride = p.y_stride = p.out_stride = {queries * channels, channels};
  p.dtype = kernel.dtype;
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
  op.get_input_type_count = [](const CustomOp*) -> std::size_t { return Identity ? 8 : 3; };
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
      Kernel kernel{api, T, Way};
      check(api.attribute_int(info, "num_heads", &kernel.num_heads));
      if (Identity) {
        check(api.attribute_int(info, "has_null", &kernel.has_null));
        check(api.attribute_int(info, "residual", &kernel.residual));
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
