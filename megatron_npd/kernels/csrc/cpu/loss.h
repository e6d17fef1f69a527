// The distillation loss of one row: its statistics, and its gradient in place. Formulas: kernels/objective.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "shard.h"

namespace npd {

// The teacher's ids S and probabilities of one token, as the caller holds them; other ranks' ids are among them.
struct Teacher {
  const int64_t* ids;
  const float* p;
  int64_t count;
};

// What one thread reuses from row to row.
struct Scratch {
  std::vector<int64_t> columns;
  std::vector<float> logits;
};

// log of the sum of exp(z * inverse_temperature) over the logits, in float64; a NaN gives NaN.
inline double log_sum_of(const std::vector<float>& logits, double inverse_temperature) {
  Sums sums;
  for (const float z : logits) sums.max = z > sums.max ? z : sums.max;
  const double base = sums.max == -INFINITY ? 0 : sums.max;
  for (const float z : logits) sums.sum += std::exp((z - base) * inverse_temperature);
  return log_sum(sums.max, sums.sum, inverse_temperature);
}

// The log of the sum of two exponentials given by their logs.
inline double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high == -INFINITY ? a + b : high + std::log1p(std::exp(low - high));
}

// to[i * stride]: log sum exp(z / temperature) over S and outside it, sum over S of p * z / temperature, the target's
// logit, and, where `at_one` (the temperature is not 1), log sum exp(z).
template <class T>
void statistics_of_row(const Passes<T>& passes, const T* row, Shard shard, int64_t target, Teacher teacher,
                       float inverse_temperature, bool at_one, Scratch& scratch, float* to, int64_t stride) {
  double pz = 0;
  scratch.columns.clear();
  scratch.logits.clear();
  for (int64_t i = 0; i < teacher.count; ++i) {
    if (!shard.owns(teacher.ids[i])) continue;
    const int64_t column = teacher.ids[i] - shard.first;
    scratch.columns.push_back(column);
    scratch.logits.push_back(to_float(row[column]));
    pz += static_cast<double>(teacher.p[i]) * scratch.logits.back();
  }
  std::sort(scratch.columns.begin(), scratch.columns.end());
  const Sums rest = passes.outside(row, shard.valid, scratch.columns.data(),
                                   static_cast<int64_t>(scratch.columns.size()), inverse_temperature, at_one);
  to[0] = static_cast<float>(log_sum_of(scratch.logits, inverse_temperature));
  to[stride] = static_cast<float>(log_sum(rest.max, rest.sum, inverse_temperature));
  to[2 * stride] = static_cast<float>(pz * inverse_temperature);
  to[3 * stride] = shard.owns(target) ? to_float(row[target - shard.first]) : 0.0f;
  if (at_one) {
    to[4 * stride] = static_cast<float>(log_add(log_sum_of(scratch.logits, 1), log_sum(rest.max, rest.sum_at_one, 1)));
  }
}

// One token's column of the operator's `coefficients`, in this order (the same in kernels/objective.py). The gradient is
//     outside S   tail_factor * exp(z / temperature - lse_tail), plus, unless the temperature is 1 (then the factor
//                 includes it), ce * exp(z - lse_one)
//     on S        student * exp(z / temperature - normaliser) - teacher * p + ce * exp(z - lse_one)
// and at the target, in S or not, `target` less.
struct Coefficients {
  float tail_factor, lse_tail, ce, lse_one, student, normaliser, teacher, target;
};
constexpr int64_t kCoefficients = 8;

inline Coefficients coefficients_at(const float* from, int64_t stride) {
  return {from[0],          from[stride],     from[2 * stride], from[3 * stride],
          from[4 * stride], from[5 * stride], from[6 * stride], from[7 * stride]};
}

// Overwrites a row of `columns` logits by their gradient. The few entries on S and at the target are read before and
// written after the dense pass, in float64: nothing is corrected after rounding. Padding gets 0. `both`: the
// temperature is not 1.
template <class T>
void gradient_of_row(const Passes<T>& passes, T* row, int64_t columns, Shard shard, int64_t target, Teacher teacher,
                     const Coefficients& c, float inverse_temperature, bool both, Scratch& scratch) {
  const Curve tail{c.tail_factor, inverse_temperature, c.lse_tail}, whole{c.ce, 1.0f, c.lse_one};
  const Curve student{c.student, inverse_temperature, c.normaliser};
  scratch.logits.clear();
  for (int64_t i = 0; i < teacher.count; ++i) {
    scratch.logits.push_back(shard.owns(teacher.ids[i]) ? to_float(row[teacher.ids[i] - shard.first]) : 0.0f);
  }
  const bool owns_target = shard.owns(target);
  const double z_target = owns_target ? to_float(row[target - shard.first]) : 0.0;

  passes.overwrite(row, shard.valid, tail, whole, both);
  std::fill(row + shard.valid, row + columns, from_float<T>(0.0f));

  if (owns_target) {  // where the target is in S, this is overwritten below
    const double value = at(tail, z_target) + (both ? at(whole, z_target) : 0.0) - c.target;
    row[target - shard.first] = from_float<T>(static_cast<float>(value));
  }
  for (int64_t i = 0; i < teacher.count; ++i) {
    const int64_t id = teacher.ids[i];
    if (!shard.owns(id)) continue;
    const double z = scratch.logits[i];
    const double kd = at(student, z) - static_cast<double>(c.teacher) * teacher.p[i];
    const double value = kd + at(whole, z) - (id == target ? c.target : 0.0f);
    row[id - shard.first] = from_float<T>(static_cast<float>(value));
  }
}

}  // namespace npd
