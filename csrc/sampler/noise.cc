#include "sampler/noise.h"

#include <cmath>

namespace pidiff {

void philox4x32(const std::uint32_t counter[4], std::uint64_t key, std::uint32_t out[4]) {
  std::uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c[0], b = std::uint64_t{0xCD9E8D57u} * c[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 4; ++i) out[i] = c[i];
}

void normal(std::uint64_t seed, std::uint64_t stream, float* out, std::size_t count) {
  constexpr double two_pi = 6.283185307179586476925286766559, unit = 0x1p-32;
  for (std::size_t block = 0; block * 4 < count; ++block) {
    const std::uint32_t counter[4] = {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                                      static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
    std::uint32_t bits[4];
    philox4x32(counter, seed, bits);
    for (std::size_t pair = 0; pair < 2; ++pair) {
      const double radius = std::sqrt(-2.0 * std::log((bits[2 * pair] + 1.0) * unit));  // (0, 1], so finite
      const double angle = two_pi * unit * bits[2 * pair + 1];
      const std::size_t at = block * 4 + pair * 2;
      if (at < count) out[at] = static_cast<float>(radius * std::cos(angle));
      if (at + 1 < count) out[at + 1] = static_cast<float>(radius * std::sin(angle));
    }
  }
}

}  // namespace pidiff
