// What the dense passes over a row leave behind, and the numbers they work with.
#pragma once

#include <cmath>
#include <cstdint>

namespace npd {

constexpr double kLog2E = 1.4426950408889634;

// Over a set of columns: the largest raw logit, sum = sum of exp((z - max) / temperature), and, where asked for,
// sum_at_one = sum of exp(z - max). No column: -infinity and zeros. A NaN logit is no maximum, but makes the sums NaN.
struct Sums {
  float max = -INFINITY;
  double sum = 0, sum_at_one = 0;
};

// log of the sum of exp(z * inverse_temperature) over the set; -infinity for no column.
inline double log_sum(float max, double sum, double inverse_temperature) {
  const double base = std::isinf(max) && max < 0 ? 0 : max * inverse_temperature;
  return base + std::log(sum);
}

// weight * exp(z * inverse_temperature - log_sum), a multiple of a softmax.
struct Curve {
  float weight, inverse_temperature, log_sum;
};

inline double at(const Curve& curve, double z) {
  return curve.weight * std::exp(z * curve.inverse_temperature - curve.log_sum);
}

}  // namespace npd
