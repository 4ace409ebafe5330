// Both products of `attention` by AMX tiles of bfloat16 (Intel, from Sapphire Rapids on). An instruction adds to a tile of
// 16 x 16 floats a product of 16 rows of sixteen pairs with sixteen rows of 16 pairs.
//
// Queries and weights, [pairs, lanes], lie as it wants its second operand. The first, K and V transposed, is packed into
// whole tiles, one after the other, with keys or dims down and their pairs of dims or keys across; what is summed over is padded
// with zeros, and nobody reads the scores of rows of K without a key.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/attention_operands.h"

namespace pidiff {
namespace {

constexpr int kVectors = 2;              // lanes of two tiles
constexpr std::int64_t kKeyBlock = 128;  // keys per pass of the online softmax
constexpr std::int64_t kSide = 16;       // rows of a tile, and units in a row
constexpr std::int64_t kWhole = kSide * kSide;

std::int64_t key_block(const AttentionParams& p) { return p.keys <= kAllKeys ? p.keys : kKeyBlock; }

// Eight whole tiles. Static: the intrinsic tells the compiler of its first eight bytes only, and a local's others were dropped.
alignas(64) const struct {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} kTileLayout;

// The tile registers are set up while one lives, and then as they were: others on this thread (oneDNN) remember their own set-up.
class Products {
 public:
  PIDIFF_INLINE Products() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    _tile_loadconfig(&kTileLayout);
  }
  PIDIFF_INLINE ~Products() { asm volatile("ldtilecfg %0" ::"m"(before_)); }

 private:
  struct {
    std::uint8_t bytes[64];
  } before_;
};

constexpr std::int64_t whole(std::int64_t rows) { return (rows + kSide - 1) / kSide * kSide; }

// Rows of queries [units, lanes], of sums [dims, lanes] and of scores [keys, lanes], with padding.
constexpr std::int64_t query_rows(std::int64_t d) { return whole(units_of(d)); }
constexpr std::int64_t sum_rows(std::int64_t d) { return whole(d); }
constexpr std::int64_t score_rows(std::int64_t count) { return whole(count); }

// A block of `count` keys is K's tiles, then V's.
std::int64_t packed_k(const AttentionParams& p, std::int64_t count) { return whole(count) * query_rows(p.head_dim); }
std::int64_t packed_size(const AttentionParams& p, std::int64_t count) {
  return packed_k(p, count) + sum_rows(p.head_dim) * whole(units_of(count));
}

// A line of K, or sixteen of V, and two rows before they are units.
std::int64_t pack_scratch(const AttentionParams& p) { return (2 + kSide) * whole(p.head_dim); }

void pack_keys(const AttentionParams& p, std::int64_t b, std::int64_t block, float* to, std::int64_t head_size,
               float* scratch) {
  const std::int64_t d = p.head_dim, first = block * key_block(p), width = query_rows(d), line = whole(d);
  const std::int64_t count = p.keys - first < key_block(p) ? p.keys - first : key_block(p), depth = whole(units_of(count));
  float* lines = scratch + 2 * line;
  std::memset(lines, 0, static_cast<std::size_t>(kSide * line) * sizeof(float));
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      const std::int64_t at = b * p.k_stride.batch + (first + t) * p.k_stride.token + h * p.k_stride.head;
      row_units(row_of(p.k, at, d, p.dtype, scratch), d, 1.0f, lines);
      float* row = to + h * head_size + t / kSide * kSide * width + t % kSide * kSide;
      for (std::int64_t u = 0; u < width; u += kSide) store(row + u * kSide, load(lines + u));
    }
  for (std::int64_t u = 0; u < depth; u += kSide)
    for (std::int64_t h = 0; h < p.heads; ++h) {
      for (std::int64_t pair = 0; pair < kSide; ++pair) {
        const std::int64_t t = 2 * (u + pair);
        const std::int64_t at = b * p.v_stride.batch + (first + t) * p.v_stride.token + h * p.v_stride.head;
        float* to_line = lines + pair * line;
        if (t >= count) {
          std::memset(to_line, 0, static_cast<std::size_t>(d) * sizeof(float));
          continue;
        }
        const float* rows[kDepth] = {row_of(p.v, at, d, p.dtype, scratch)};
        if (t + 1 < count) rows[1] = row_of(p.v, at + p.v_stride.token, d, p.dtype, scratch + line);
        column_units(rows, d, to_line);
      }
      float* tile = to + h * head_size + packed_k(p, count) + u * kSide;
      for (std::int64_t i = 0; i < line; i += kSide) transpose(lines + i, line, kSide, kSide, tile + i * depth, kSide);
    }
}

// A pair of tiles of rows (one, if not Two) times NV tiles of lanes: to += a b over `units`, from zero if First.
template <int NV, bool Two, bool First>
PIDIFF_INLINE void multiply_tiles(const float* a, const float* b, std::int64_t units, float* to) {
  constexpr std::int64_t lanes = NV * kLanes, row = lanes * 4;
  const float* second = a + kSide * units;
  asm volatile("" ::: "memory");  // what is loaded has been stored
  if constexpr (First) {
    _tile_zero(0);
    if constexpr (NV == 2) _tile_zero(1);
    if constexpr (Two) _tile_zero(2);
    if constexpr (Two && NV == 2) _tile_zero(3);
  } else {
    _tile_loadd(0, to, row);
    if constexpr (NV == 2) _tile_loadd(1, to + kSide, row);
    if constexpr (Two) _tile_loadd(2, to + kSide * lanes, row);
    if constexpr (Two && NV == 2) _tile_loadd(3, to + kSide * lanes + kSide, row);
  }
  for (std::int64_t u = 0; u < units; u += kSide) {
    _tile_loadd(4, a + u * kSide, 64);
    _tile_loadd(6, b + u * lanes, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NV == 2) {
      _tile_loadd(7, b + u * lanes + kSide, row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Two) {
      _tile_loadd(5, second + u * kSide, 64);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (Two && NV == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, row);
  if constexpr (NV == 2) _tile_stored(1, to + kSide, row);
  if constexpr (Two) _tile_stored(2, to + kSide * lanes, row);
  if constexpr (Two && NV == 2) _tile_stored(3, to + kSide * lanes + kSide, row);
  asm volatile("" ::: "memory");
}

// to [rows, lanes] += a [rows, units] b [units, lanes], all in whole tiles.
template <int NV, bool First>
PIDIFF_INLINE void multiply_rows(const float* a, const float* b, std::int64_t rows, std::int64_t units, float* to) {
  constexpr std::int64_t lanes = NV * kLanes;
  std::int64_t i = 0;
  for (; i + 2 * kSide <= rows; i += 2 * kSide) multiply_tiles<NV, true, First>(a + i * units, b, units, to + i * lanes);
  if (i < rows) multiply_tiles<NV, false, First>(a + i * units, b, units, to + i * lanes);
}

// scores[t][lanes] = k[t] . queries; raises `top` to the block's maximum if Raise.
template <int NV, bool Raise>
void scores(const float* k, const float* queries, std::int64_t count, std::int64_t d, float* to, Float (&top)[NV]) {
  constexpr std::int64_t lanes = NV * kLanes;
  multiply_rows<NV, true>(k, queries, whole(count), query_rows(d), to);
  for (std::int64_t t = 0; Raise && t < count; ++t)
    for (int j = 0; j < NV; ++j) top[j] = maximum(top[j], load(to + t * lanes + j * kLanes));
}

// sums[i][lanes] += sum_t v[t][i] * weights[t], from zero if `first`; weights are padded with zeros.
template <int NV>
void accumulate(const float* v, float* weights, std::int64_t count, std::int64_t d, bool first, float* sums) {
  constexpr std::int64_t lanes = NV * kLanes;
  const std::int64_t units = units_of(count);
  std::memset(weights + units * lanes, 0, static_cast<std::size_t>((whole(units) - units) * lanes) * sizeof(float));
  if (first)
    multiply_rows<NV, true>(v, weights, whole(d), whole(units), sums);
  else
    multiply_rows<NV, false>(v, weights, whole(d), whole(units), sums);
}

}  // namespace
}  // namespace pidiff
