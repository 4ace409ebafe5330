// IEEE half precision and bfloat16 by bit operations: for compilers and processors without such types. `static`, because
// files with different processor flags include it (see attention_cpu.h).
#pragma once

#include <cstdint>
#include <cstring>

namespace pidiff {

static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  // Shifted into place the exponent is 112 too small; the multiplication repairs it and normalises subnormals.
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((half & 0x7c00u) == 0x7c00u) bits = magnitude | 0x7f800000u;  // infinity, NaN
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even; overflow gives infinity.
static inline std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
  if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (bits < 0x38800000u) {                                                    // below 2^-14: subnormal
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;  // the sum's own rounding leaves the half's bits at the end of the mantissa
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

static inline float bfloat_to_float(std::uint16_t bfloat) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even; overflow gives infinity.
static inline std::uint16_t float_to_bfloat(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace pidiff
