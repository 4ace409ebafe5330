// libpidiff_ort.so: SessionOptions.register_custom_ops_library(path) calls RegisterCustomOps.
//
// The session config entry "pidiff.precision", set before that call, chooses the arithmetic of the session's operators:
// "auto" may round where that is faster, all else (or no entry) is float32.
#include <cstring>
#include <mutex>

#include "plugins/ort/ops.h"

namespace pidiff::ort {
namespace {

Status* may_round(const Api& api, const SessionOptions* options, bool* low) {
  constexpr const char* key = "pidiff.precision";
  int given = 0;
  *low = false;
  if (Status* status = api.has_config(options, key, &given)) return status;
  if (given == 0) return nullptr;
  char value[16] = "";
  std::size_t size = sizeof value;
  if (Status* status = api.get_config(options, key, value, &size)) return status;
  *low = std::strcmp(value, "auto") == 0;
  return nullptr;
}

Status* make_domain(const Api& api, bool low, Domain** out) {
  Domain* fresh = nullptr;
  if (Status* status = api.create_domain("pidiff", &fresh)) return status;
  for (const CustomOp& op : all_ops(low))
    if (Status* status = api.domain_add(fresh, &op)) return status;
  *out = fresh;
  return nullptr;
}

}  // namespace
}  // namespace pidiff::ort

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
  bool low = false;
  if (Status* status = may_round(api, options, &low)) return status;
  // One domain of each kind for the process: sessions keep pointers into it, so it is never released.
  static std::mutex mutex;
  static Domain* domains[2] = {};
  const std::lock_guard<std::mutex> lock(mutex);
  Domain*& domain = domains[low ? 1 : 0];
  if (domain == nullptr)
    if (Status* status = make_domain(api, low, &domain)) return status;
  return api.add_domain(options, domain);
}
