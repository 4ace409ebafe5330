// convolution (convolution_params.h) by Winograd's way for one instruction set: vector lanes are channels. Included by attention_simd.h.
//
// Tiles pass in blocks. Their inputs are transformed to units [16, rows, units of channels]; then, for a panel of outputs after the other,
// sixteen products with the panel's weights, and the transform of what comes out.
#pragma once

#include "kernels/attention_cpu.h"
#include "kernels/attention_operands.h"

namespace pidiff {
namespace {

constexpr int kPanelVectors = kTile >= 8 ? 4 : 2;  // with kTileRows the register tile
constexpr std::int64_t kPanel = kPanelVectors * kLanes;
constexpr int kTileRows = 6;

PIDIFF_INLINE Float values(const float* from) { return load(from); }
PIDIFF_INLINE Float values(const std::uint16_t* bfloats) {
  return (Float)(__builtin_convertvector(*reinterpret_cast<const Bits16*>(bfloats), Bits) << 16);
}
PIDIFF_INLINE void put(float* to, Float value) { store(to, value); }
PIDIFF_INLINE void put(std::uint16_t* to, Float value) {
  float wide[kLanes];
  store(wide, value);
  narrow(wide, to, kLanes, DType::bfloat16);
}
// A vector of channels as steps of a sum: element c of a row of units.
PIDIFF_INLINE void put_steps(float* row, std::int64_t c, Float value) {
#ifdef PIDIFF_BF16
  put(reinterpret_cast<std::uint16_t*>(row) + c, value);
#else
  put(row + c, value);
#endif
}

// The three transforms along one axis.
PIDIFF_INLINE void transform_input(Float& a, Float& b, Float& c, Float& d) {
  const Float second = b, third = c;
  a -= third;
  b = second + third;
  c = third - second;
  d = second - d;
}
PIDIFF_INLINE void transform_output(Float a, Float b, Float c, Float d, Float& first, Float& second) {
  first = a + b + c;
  second = b - c - d;
}
PIDIFF_INLINE void transform_weight(Float a, Float b, Float c, Float (&to)[4]) {
  to[0] = a;
  to[1] = 0.5f * (a + b + c);
  to[2] = 0.5f * (a - b + c);
  to[3] = c;
}

std::int64_t convolution_rows(std::int64_t tiles) { return (tiles + kTileRows - 1) / kTileRows * kTileRows; }

// Floats: transformed inputs, products of a panel, a pixel of zeros.
std::int64_t convolution_scratch(const ConvolutionParams& p, std::int64_t tiles) {
  return 16 * convolution_rows(tiles) * (units_of(p.channels) + kPanel) + p.channels;
}

// Weights [out_channels, channels, 3, 3] of one panel of outputs -> units [16, units of channels, kPanel]. scratch: kDepth * 16 * kPanel floats.
void pack_convolution(const float* weight, std::int64_t channels, std::int64_t first, float* to, float* scratch) {
  for (std::int64_t c = 0; c < channels; c += kDepth) {
    for (int step = 0; step < kDepth; ++step)
      for (std::int64_t o = 0; o < kPanel; o += kLanes) {
        Float rows[3][4], all[4];
        for (int column = 0; column < 3; ++column) {
          float g[3][kLanes];
          for (int row = 0; row < 3; ++row)
            for (int lane = 0; lane < kLanes; ++lane)
              g[row][lane] = weight[((first + o + lane) * channels + c + step) * 9 + row * 3 + column];
          transform_weight(load(g[0]), load(g[1]), load(g[2]), rows[column]);
        }
        for (int row = 0; row < 4; ++row) {
          transform_weight(rows[0][row], rows[1][row], rows[2][row], all);
          for (int column = 0; column < 4; ++column) store(scratch + (step * 16 + row * 4 + column) * kPanel + o, all[column]);
        }
      }
    for (std::int64_t i = 0; i < 16; ++i)
      for (std::int64_t o = 0; o < kPanel; o += kLanes) {
        Float steps[kDepth];
        for (int step = 0; step < kDepth; ++step) steps[step] = load(scratch + (step * 16 + i) * kPanel + o);
        store(to + (i * units_of(channels) + c / kDepth) * kPanel + o, unit_of(steps));
      }
  }
}

// Where a tile lies: its picture, and its first output's row and column.
struct TilePlace {
  std::int64_t batch, y, x;
};
PIDIFF_INLINE TilePlace place_of(const ConvolutionParams& p, std::int64_t tile) {
  const std::int64_t across = p.width / 2, all = p.height / 2 * across;
  return {tile / all, tile % all / across * 2, tile % across * 2};
}

// Tile's 4 x 4 pixels -> row `row` of units [16, rows, units]; beyond the picture there are `zeros`.
template <class T>
void transform_tile(const ConvolutionParams& p, std::int64_t tile, const T* zeros, std::int64_t row, std::int64_t rows, float* to) {
  const TilePlace at = place_of(p, tile);
  const T* pixel[16];
  for (int i = 0; i < 16; ++i) {
    const std::int64_t y = at.y - 1 + i / 4, x = at.x - 1 + i % 4;
    const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
    const std::int64_t line = at.batch * (p.height / p.upsampled) + y / p.upsampled;
    pixel[i] = inside ? static_cast<const T*>(p.x) + (line * (p.width / p.upsampled) + x / p.upsampled) * p.channels : zeros;
  }
  const std::int64_t units = units_of(p.channels);
  for (std::int64_t c = 0; c < p.channels; c += kLanes) {
    Float d[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) d[i] = values(pixel[i] + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) transform_input(d[i], d[4 + i], d[8 + i], d[12 + i]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) transform_input(d[i], d[i + 1], d[i + 2], d[i + 3]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) put_steps(to + (i * rows + row) * units, c, d[i]);
  }
}

// sums [kTileRows, kPanel], from zero if `first`, plus a [kTileRows, units], rows `across` apart, times weights [units, kPanel].
PIDIFF_INLINE void add_rows(const float* a, std::int64_t across, std::int64_t units, const float* weights, bool first, float* sums) {
  Float sum[kTileRows][kPanelVectors] = {};
  if (!first)
    for (int i = 0; i < kTileRows; ++i)
      for (int j = 0; j < kPanelVectors; ++j) sum[i][j] = load(sums + i * kPanel + j * kLanes);
  multiply_panel<kTileRows, kPanelVectors, false>(a, weights, kPanel, units, sum, across);
  for (int i = 0; i < kTileRows; ++i)
    for (int j = 0; j < kPanelVectors; ++j) store(sums + i * kPanel + j * kLanes, sum[i][j]);
}

// Sums of the outputs from `first` on -> elements of `out` from `to` on.
template <class T>
PIDIFF_INLINE void put_output(const ConvolutionParams& p, std::int64_t to, std::int64_t first, Float sum) {
  sum += load(p.bias + first);
  if (p.residual != nullptr) sum += values(static_cast<const T*>(p.residual) + to);
  put(static_cast<T*>(p.out) + to, sum);
}

// Row `row` of products [16, rows, kPanel] -> the tile's 2 x 2 pixels of the panel of outputs from `first` on.
template <class T>
void put_tile(const ConvolutionParams& p, std::int64_t tile, std::int64_t first, const float* products, std::int64_t row, std::int64_t rows) {
  const TilePlace at = place_of(p, tile);
  for (std::int64_t o = 0; o < kPanel; o += kLanes) {
    Float y[2][4], pixel[2][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto product = [&](int j) PIDIFF_LAMBDA_INLINE { return load(products + ((j * 4 + i) * rows + row) * kPanel + o); };
      transform_output(product(0), product(1), product(2), product(3), y[0][i], y[1][i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      transform_output(y[i][0], y[i][1], y[i][2], y[i][3], pixel[i][0], pixel[i][1]);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        put_output<T>(p, ((at.batch * p.height + at.y + i) * p.width + at.x + j) * p.out_channels + first + o, first + o, pixel[i][j]);
      }
    }
  }
}

template <class T>
void convolve(const ConvolutionParams& p, std::int64_t first, std::int64_t count, float* scratch) {
  const std::int64_t rows = convolution_rows(count), units = units_of(p.channels);
  float *products = scratch + 16 * rows * units, *zeros = products + 16 * rows * kPanel;
  std::memset(zeros, 0, static_cast<std::size_t>(p.channels) * sizeof(float));
  for (std::int64_t t = 0; t < count; ++t) transform_tile(p, first + t, reinterpret_cast<const T*>(zeros), t, rows, scratch);
  for (std::int64_t o = 0; o < p.out_channels; o += kPanel) {
    for (std::int64_t i = 0; i < 16; ++i)
      for (std::int64_t t = 0; t < rows; t += kTileRows)  // the last ones may be nobody's
        add_rows(scratch + (i * rows + t) * units, units, units, p.weights + (o * 16 + i * kPanel) * units, true, products + (i * rows + t) * kPanel);
    for (std::int64_t t = 0; t < count; ++t) put_tile<T>(p, first + t, o, products, t, rows);
  }
}

void convolution_tiles(const ConvolutionParams& p, std::int64_t first, std::int64_t count, float* scratch) {
  if (p.dtype == DType::bfloat16)
    convolve<std::uint16_t>(p, first, count, scratch);
  else
    convolve<float>(p, first, count, scratch);
}

}  // namespace
}  // namespace pidiff
