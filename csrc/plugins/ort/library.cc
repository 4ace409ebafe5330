// libpidiff_ort.so: SessionOptions.register_custom_ops_library(path) calls RegisterCustomOps.
#include <mutex>

#include "plugins/ort/ops.h"

extern "C" __attribute__((visibility("default"))) pidiff::ort::Status* RegisterCustomOps(
    pidiff::ort::SessionOptions* options, const pidiff::ort::ApiBase* base) {
  using namespace pidiff::ort;
  const Table table = base->get_api(kApiVersion);
  if (table == nullptr) {
    // Too old to know our version; slot 0 makes the error in every version.
    const Table oldest = base->get_api(1);
    return oldest == nullptr ? nullptr : Api{oldest}.create_status(kFail, "onnxruntime must be 1.17 or newer");
  }
  const Api api{table};
  // One domain for the process: sessions keep pointers into it, so it is never released.
  static std::mutex mutex;
  static Domain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    Domain* fresh = nullptr;
    if (Status* status = api.create_domain("pidiff", &fresh)) return status;
    std::size_t count = 0;
    const CustomOp* const* ops = all_ops(&count);
    for (std::size_t i = 0; i < count; ++i)
      if (Status* status = api.domain_add(fresh, ops[i])) return status;
    domain = fresh;
  }
  return api.add_domain(options, domain);
}
