// Gaussian noise that depends on (seed, stream, position within the image) alone: a picture is the same in any batch,
// on any number of threads, on any machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pidiff {

// Philox4x32-10, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11). counter and out: 4 words.
void philox4x32(const std::uint32_t counter[4], std::uint64_t key, std::uint32_t out[4]);

// out[0, count) ~ N(0, 1). The counter is (block of four, stream), the key is the seed; Box-Muller in float64.
void normal(std::uint64_t seed, std::uint64_t stream, float* out, std::size_t count);

}  // namespace pidiff
