// Inside the CPU implementations: what each instruction set's file hands to the driver in attention.cc.
//
// The files attention_{portable,avx2,avx512,avx512bf16,amx}.cc are compiled with different processor flags. They keep
// everything they define in an anonymous namespace and instantiate no template of the standard library: the linker
// would otherwise merge such functions and could keep the copy with instructions that this processor lacks.
#pragma once

#include "kernels/attention.h"
#include "kernels/convolution_params.h"
#include "kernels/group_norm.h"
#include "kernels/half.h"

namespace pidiff {

// One element as a float, and back.
static inline float element(const void* base, std::int64_t index, DType dtype) {
  if (dtype == DType::float32) return static_cast<const float*>(base)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(base)[index];
  return dtype == DType::float16 ? half_to_float(bits) : bfloat_to_float(bits);
}
[[maybe_unused]] static inline void set_element(void* base, std::int64_t index, float value, DType dtype) {
  if (dtype == DType::float32)
    static_cast<float*>(base)[index] = value;
  else
    static_cast<std::uint16_t*>(base)[index] = dtype == DType::float16 ? float_to_half(value) : float_to_bfloat(value);
}

// identity_mix's operands, unpacked once per call. `a` columns are reordered to t * heads + head and padded.
struct PackedIdentity {
  const float* a = nullptr;  // [batch * people, channels, padded]; log2(e) folded in
  const float* v = nullptr;  // [batch * people, tokens, channels]
  std::int64_t padded = 0;   // heads * columns, rounded up to `column_multiple`
};

struct CpuKernels {
  std::int64_t query_block;  // rows of one `attention` task
  std::int64_t row_block;    // rows of one `identity_mix` task
  std::int64_t column_multiple;
  // Keys and values of one (batch, head) are packed before the tasks that share them: blocks of key_block keys, each
  // packed_size(params, its keys) floats.
  std::int64_t (*key_block)(const AttentionParams&);
  std::int64_t (*packed_size)(const AttentionParams&, std::int64_t keys);
  // Floats of scratch one task needs; the driver aligns it to 64 bytes.
  std::int64_t (*pack_scratch)(const AttentionParams&);
  std::int64_t (*attention_scratch)(const AttentionParams&);
  std::int64_t (*identity_scratch)(const IdentityMixParams&, std::int64_t padded);
  // One task: a block of keys of all heads, whose results lie head_size floats apart; rows [row0, row0 + rows) of one
  // (batch, head), or of one batch.
  void (*pack_keys)(const AttentionParams&, std::int64_t batch, std::int64_t block, float* to, std::int64_t head_size,
                    float* scratch);
  void (*attention_rows)(const AttentionParams&, const float* packed, std::int64_t batch, std::int64_t head,
                         std::int64_t row0, std::int64_t rows, float* scratch);
  void (*identity_rows)(const IdentityMixParams&, const PackedIdentity&, std::int64_t batch, std::int64_t row0,
                        std::int64_t rows, float* scratch);
  // Two tasks of `group_norm` on rows [first, first + rows) of all pictures' together; `lines`: kNormLines * channels floats. Sums [2,
  // channels] of x - pivot and of its square; out = x * factor + offset, by channel, and SiLU.
  void (*norm_sums)(const GroupNormParams&, const float* pivot, std::int64_t first, std::int64_t rows, float* sums, float* lines);
  void (*norm_rows)(const GroupNormParams&, const float* factor, const float* offset, std::int64_t first, std::int64_t rows,
                    float* lines);
  // Convolution by Winograd's way: outputs of a panel of packed weights, and steps of a sum in a unit; a panel of weights, packed; one task's tiles.
  std::int64_t convolution_panel, convolution_depth;
  void (*pack_convolution)(const float* weight, std::int64_t channels, std::int64_t first, float* to, float* scratch);
  std::int64_t (*convolution_scratch)(const ConvolutionParams&, std::int64_t tiles);
  void (*convolution_tiles)(const ConvolutionParams&, std::int64_t first, std::int64_t count, float* scratch);
  // The same where it is done directly, on rows.
  void (*pack_direct)(const float* weight, std::int64_t channels, std::int64_t taps, std::int64_t first, float* to);
  std::int64_t (*direct_scratch)(const ConvolutionParams&, std::int64_t rows);
  void (*direct_rows)(const ConvolutionParams&, std::int64_t first, std::int64_t count, float* scratch);
};

constexpr std::int64_t kNormLines = 4;

extern const CpuKernels portable_kernels;
#ifdef PIDIFF_X86
extern const CpuKernels avx2_kernels;
extern const CpuKernels avx512_kernels;
extern const CpuKernels avx512bf16_kernels;
extern const CpuKernels amx_kernels;
#endif

// Those of one implementation: null where this processor does not run it, or std::runtime_error.
const CpuKernels* kernels_of(Implementation implementation);
const CpuKernels& require_kernels(Implementation implementation);

// The clear loops (attention_reference.cc), single-threaded.
void attention_reference(const AttentionParams& params);
void identity_mix_reference(const IdentityMixParams& params);
void group_norm_reference(const GroupNormParams& params);

}  // namespace pidiff
