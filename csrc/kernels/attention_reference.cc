// The clear version of the primitives: float32 arithmetic, one loop per index, no blocking. Everything else is
// measured against it.
#include <cmath>
#include <vector>

#include "kernels/attention_cpu.h"

namespace pidiff {
namespace {

// In place: logits -> probabilities.
void softmax(float* values, std::int64_t count, std::int64_t stride) {
  float top = values[0];
  for (std::int64_t i = 1; i < count; ++i) top = std::fmax(top, values[i * stride]);
  float sum = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) sum += values[i * stride] = std::exp(values[i * stride] - top);
  for (std::int64_t i = 0; i < count; ++i) values[i * stride] /= sum;
}

}  // namespace

void attention_reference(const AttentionParams& p) {
  const auto at = [](const AttentionParams::Strides& s, std::int64_t b, std::int64_t t, std::int64_t h) {
    return b * s.batch + t * s.token + h * s.head;
  };
  std::vector<float> weights(p.keys);
  std::vector<float> sum(p.head_dim);
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t h = 0; h < p.heads; ++h)
      for (std::int64_t s = 0; s < p.queries; ++s) {
        const std::int64_t query = at(p.q_stride, b, s, h);
        for (std::int64_t t = 0; t < p.keys; ++t) {
          const std::int64_t key = at(p.k_stride, b, t, h);
          float dot = 0.0f;
          for (std::int64_t i = 0; i < p.head_dim; ++i)
            dot += element(p.q, query + i, p.dtype) * element(p.k, key + i, p.dtype);
          weights[t] = dot * p.scale;
        }
        softmax(weights.data(), p.keys, 1);
        sum.assign(p.head_dim, 0.0f);
        for (std::int64_t t = 0; t < p.keys; ++t) {
          const std::int64_t value = at(p.v_stride, b, t, h);
          for (std::int64_t i = 0; i < p.head_dim; ++i) sum[i] += weights[t] * element(p.v, value + i, p.dtype);
        }
        const std::int64_t out = at(p.out_stride, b, s, h);
        for (std::int64_t i = 0; i < p.head_dim; ++i) set_element(p.out, out + i, sum[i], p.dtype);
      }
}

void identity_mix_reference(const IdentityMixParams& p) {
  const std::int64_t columns = p.columns(), width = p.heads * columns, d = p.head_dim();
  std::vector<float> logits(width), row(p.channels);
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t s = 0; s < p.queries; ++s) {
      const std::int64_t h_row = b * p.h_stride.batch + s * p.h_stride.token;
      const std::int64_t y_row = b * p.y_stride.batch + s * p.y_stride.token;
      const std::int64_t out_row = b * p.out_stride.batch + s * p.out_stride.token;
      for (std::int64_t c = 0; c < p.channels; ++c) row[c] = element(p.h, h_row + c, p.dtype);
      for (std::int64_t person = 0; person < p.people; ++person) {
        const std::int64_t which = b * p.people + person;
        logits.assign(width, 0.0f);
        for (std::int64_t c = 0; c < p.channels; ++c) {
          const float y = element(p.y, y_row + c, p.dtype);
          for (std::int64_t j = 0; j < width; ++j)
            logits[j] += y * element(p.a, (which * p.channels + c) * width + j, p.dtype);
        }
        const float weight = element(p.id_scale, b, p.dtype) * element(p.mask, which * p.queries + s, p.dtype);
        float mass = 0.0f;
        for (std::int64_t head = 0; head < p.heads; ++head) {
          float* probability = &logits[head * columns];
          softmax(probability, columns, 1);
          for (std::int64_t t = 0; t < p.tokens; ++t) {
            mass += probability[t];
            for (std::int64_t i = head * d; i < (head + 1) * d; ++i)
              row[i] += weight * probability[t] * element(p.v, (which * p.tokens + t) * p.channels + i, p.dtype);
          }
        }
        set_element(p.id_mass, which * p.queries + s, p.has_null ? mass / static_cast<float>(p.heads) : 0.0f, p.dtype);
      }
      for (std::int64_t c = 0; c < p.channels; ++c) set_element(p.out, out_row + c, row[c], p.dtype);
    }
}

void group_norm_reference(const GroupNormParams& p) {
  const std::int64_t width = p.channels / p.groups;
  std::vector<float> values(p.rows * width);
  for (std::int64_t b = 0; b < p.batch; ++b)
    for (std::int64_t group = 0; group < p.groups; ++group) {
      const auto channel = [&](std::int64_t i) { return group * width + i % width; };
      const auto at = [&](std::int64_t i) { return (b * p.rows + i / width) * p.channels + channel(i); };
      double mean = 0.0, variance = 0.0;
      for (std::int64_t i = 0; i < p.rows * width; ++i) {
        values[i] = element(p.x, at(i), p.dtype);
        if (p.shift != nullptr) values[i] += element(p.shift, (p.shifts == 1 ? 0 : b) * p.channels + channel(i), p.dtype);
        mean += values[i];
      }
      mean /= static_cast<double>(values.size());
      for (const float value : values) variance += (value - mean) * (value - mean);
      const double scale = 1.0 / std::sqrt(variance / static_cast<double>(values.size()) + p.epsilon);
      for (std::int64_t i = 0; i < p.rows * width; ++i) {
        const auto y = static_cast<float>((values[i] - mean) * scale * p.weight[channel(i)] + p.bias[channel(i)]);
        set_element(p.out, at(i), p.silu ? y / (1.0f + std::exp(-y)) : y, p.dtype);
      }
    }
}

}  // namespace pidiff
