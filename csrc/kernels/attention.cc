// Validation, choice of implementation, and the split of both primitives into tasks.
#include "kernels/attention.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "kernels/attention_cpu.h"
#include "kernels/driver.h"

#if defined(PIDIFF_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef PIDIFF_HAS_CUDA
#include "kernels/attention_cuda.h"
#endif

namespace pidiff {
namespace {

constexpr struct {
  Implementation value;
  const char* name;
} names[] = {
    {Implementation::automatic, "auto"},
    {Implementation::low_precision, "low"},
    {Implementation::reference, "reference"},
#ifdef __aarch64__
    {Implementation::portable, "neon"},
#else
    {Implementation::portable, "portable"},
#endif
    {Implementation::avx2, "avx2"},
    {Implementation::avx512, "avx512"},
    {Implementation::avx512bf16, "avx512bf16"},
    {Implementation::amx, "amx"},
    {Implementation::cuda, "cuda"},
};

#ifdef PIDIFF_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Linux hands the tile registers to a process that asks for them (Documentation/arch/x86/xstate.rst).
bool has_amx() {
#ifdef __linux__
  static const bool granted = [] {
    constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bfloat16) && (d & tiles) && has_avx512() &&
           __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

}  // namespace

const CpuKernels* kernels_of(Implementation implementation) {
  switch (implementation) {
    case Implementation::portable: return &portable_kernels;
#ifdef PIDIFF_X86
    case Implementation::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2_kernels : nullptr;
    case Implementation::avx512: return has_avx512() ? &avx512_kernels : nullptr;
    case Implementation::avx512bf16:
      return has_avx512() && __builtin_cpu_supports("avx512bf16") ? &avx512bf16_kernels : nullptr;
    case Implementation::amx: return has_amx() ? &amx_kernels : nullptr;
#endif
    default: return nullptr;
  }
}

const CpuKernels& require_kernels(Implementation implementation) {
  if (const CpuKernels* kernels = kernels_of(implementation)) return *kernels;
  throw std::runtime_error(std::string("implementation must be one that runs on this machine, got ") +
                           name_of(implementation));
}

namespace {

bool in_float32(Implementation implementation) {
  return implementation != Implementation::avx512bf16 && implementation != Implementation::amx;
}

// The one that rounds and is faster than float32, or `automatic`. AVX-512-BF16 is twice as fast as float32 on Zen 4 and half as
// fast on Emerald Rapids, where Intel leaves bfloat16 to AMX (benchmarks/RESULTS.md). Not timed here: pictures would depend on
// what else the machine does.
Implementation fast_rounding() {
  if (kernels_of(Implementation::amx) != nullptr) return Implementation::amx;
#ifdef PIDIFF_X86
  if (__builtin_cpu_is("amd") && kernels_of(Implementation::avx512bf16) != nullptr) return Implementation::avx512bf16;
#endif
  return Implementation::automatic;
}

}  // namespace

Implementation resolve_rounding(Implementation wanted) {
  if (wanted == Implementation::low_precision) wanted = fast_rounding();
  if (wanted != Implementation::automatic) return wanted;
  const auto all = cpu_implementations();
  return *std::find_if(all.rbegin(), all.rend(), in_float32);
}

namespace {

constexpr std::int64_t kManyKeys = 512;  // from here on `low_precision` rounds attention

Implementation resolve(Implementation wanted, std::int64_t keys) {
  return resolve_rounding(wanted == Implementation::low_precision && keys < kManyKeys ? Implementation::automatic : wanted);
}

// Keys and values of every (batch, head), packed.
class Packed {
 public:
  Packed(const AttentionParams& p, const Parallel& pool, const CpuKernels& kernels)
      : heads_(p.heads) {
    const std::int64_t block = kernels.key_block(p), blocks = (p.keys + block - 1) / block;
    const std::int64_t whole = kernels.packed_size(p, block), last = p.keys - (blocks - 1) * block;
    size_ = (blocks - 1) * whole + kernels.packed_size(p, last);
    memory_.emplace(p.batch * p.heads * size_);
    run_tasks(pool, p.batch * blocks, kernels.pack_scratch(p), [&](std::int64_t index, float* scratch) {
      const std::int64_t batch = index / blocks, at = index % blocks;
      kernels.pack_keys(p, batch, at, memory_->get() + batch * p.heads * size_ + at * whole, size_, scratch);
    });
  }
  const float* of(std::int64_t batch, std::int64_t head) const {
    return memory_->get() + (batch * heads_ + head) * size_;
  }

 private:
  std::int64_t heads_, size_;
  std::optional<Scratch> memory_;
};

// One (batch, person): A columns from head * columns + t to t * heads + head, so that a softmax over t runs across
// whole vectors of heads; the padding repeats nothing (zeros) and is never read back.
void pack_identity(const IdentityMixParams& p, std::int64_t which, std::int64_t padded, float* a, float* v) {
  constexpr float log2e = 1.44269504088896340736f;
  const std::int64_t columns = p.columns(), width = p.heads * columns;
  for (std::int64_t c = 0; c < p.channels; ++c) {
    float* row = a + c * padded;
    const std::int64_t from = (which * p.channels + c) * width;
    for (std::int64_t head = 0; head < p.heads; ++head)
      for (std::int64_t t = 0; t < columns; ++t)
        row[t * p.heads + head] = element(p.a, from + head * columns + t, p.dtype) * log2e;
    std::fill(row + width, row + padded, 0.0f);
  }
  const std::int64_t values = p.tokens * p.channels;
  for (std::int64_t i = 0; i < values; ++i) v[i] = element(p.v, which * values + i, p.dtype);
}

}  // namespace

const char* name_of(Implementation implementation) {
  for (const auto& entry : names)
    if (entry.value == implementation) return entry.name;
  return "unknown";
}

Implementation parse_implementation(const std::string& name) {
  std::string choices;
  for (const auto& entry : names) {
    if (name == entry.name) return entry.value;
    choices += choices.empty() ? entry.name : std::string(", ") + entry.name;
  }
  throw std::invalid_argument("implementation must be one of " + choices + ", got " + name);
}

std::vector<Implementation> cpu_implementations() {
  std::vector<Implementation> result{Implementation::reference};
  for (auto one :
       {Implementation::portable, Implementation::avx2, Implementation::avx512, Implementation::avx512bf16,
        Implementation::amx})
    if (kernels_of(one) != nullptr) result.push_back(one);
  return result;
}

void attention(const AttentionParams& p, const Parallel& pool, Implementation wanted) {
  check(p.batch >= 0 && p.queries >= 0, "batch and queries must not be negative");
  check(p.keys > 0, "keys must be positive");
  check(p.heads > 0 && p.head_dim > 0, "heads and head_dim must be positive");
  const Implementation implementation = resolve(wanted, p.keys);
  if (p.batch == 0 || p.queries == 0) return;
#ifdef PIDIFF_HAS_CUDA
  if (implementation == Implementation::cuda) return attention_cuda_host(p);
#endif
  if (implementation == Implementation::reference) return attention_reference(p);
  const CpuKernels& kernels = require_kernels(implementation);
  const Packed packed(p, pool, kernels);
  const std::int64_t block = kernels.query_block, blocks = (p.queries + block - 1) / block;
  // Tasks that run one after the other share what is large: a head's keys and values if they are long, else the rows
  // of q and out, which lie side by side for all heads.
  const bool heads_inside = p.keys * p.heads * p.head_dim * static_cast<std::int64_t>(size_of(p.dtype)) <= 256 * 1024;
  run_tasks(pool, p.batch * p.heads * blocks, kernels.attention_scratch(p), [&](std::int64_t index, float* scratch) {
    const std::int64_t inner = heads_inside ? p.heads : blocks, outer = heads_inside ? blocks : p.heads;
    const std::int64_t first = index / inner % outer, second = index % inner, batch = index / (inner * outer);
    const std::int64_t head = heads_inside ? second : first, row0 = (heads_inside ? first : second) * block;
    kernels.attention_rows(p, packed.of(batch, head), batch, head, row0, std::min(block, p.queries - row0), scratch);
  });
}

void identity_mix(const IdentityMixParams& p, const Parallel& pool, Implementation wanted) {
  check(p.batch >= 0 && p.queries >= 0 && p.people >= 0, "batch, queries and people must not be negative");
  check(p.heads > 0 && p.channels > 0 && p.channels % p.heads == 0, "channels must be a positive multiple of heads");
  check(p.people == 0 || p.tokens > 0, "tokens must be positive");
  const Implementation implementation = resolve(wanted, 0);
  if (p.batch == 0 || p.queries == 0) return;
#ifdef PIDIFF_HAS_CUDA
  if (implementation == Implementation::cuda) return identity_mix_cuda_host(p);
#endif
  if (implementation == Implementation::reference) return identity_mix_reference(p);
  const CpuKernels& kernels = require_kernels(implementation);

  PackedIdentity packed;
  const std::int64_t multiple = kernels.column_multiple;
  packed.padded = (p.heads * p.columns() + multiple - 1) / multiple * multiple;
  const std::int64_t a_floats = p.channels * packed.padded, v_floats = p.tokens * p.channels;
  const Scratch memory(p.batch * p.people * (a_floats + v_floats));
  float* a = memory.get();
  float* v = a + p.batch * p.people * a_floats;
  parallel_for(pool, static_cast<std::size_t>(p.batch * p.people), [&](std::size_t which) {
    const auto i = static_cast<std::int64_t>(which);
    pack_identity(p, i, packed.padded, a + i * a_floats, v + i * v_floats);
  });
  packed.a = a;
  packed.v = v;

  const std::int64_t block = kernels.row_block, blocks = (p.queries + block - 1) / block;
  run_tasks(pool, p.batch * blocks, kernels.identity_scratch(p, packed.padded),
            [&](std::int64_t index, float* scratch) {
              const std::int64_t row0 = index % blocks * block;
              kernels.identity_rows(p, packed, index / blocks, row0, std::min(block, p.queries - row0), scratch);
            });
}

}  // namespace pidiff
