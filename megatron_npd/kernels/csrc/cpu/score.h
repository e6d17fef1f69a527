// Scores of one row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "isa.h"
#include "shard.h"

namespace npd {

// to[0], to[stride], to[2 * stride]: the largest logit m, the sum of exp((z - m) / temperature), the target's logit.
template <class T>
void score_row(const Passes<T>& passes, const T* row, Shard shard, int64_t target, float inverse_temperature, float* to,
               int64_t stride) {
  const Sums sums = passes.outside(row, shard.valid, nullptr, 0, inverse_temperature, false);
  to[0] = sums.max;
  to[stride] = static_cast<float>(sums.sum);
  to[2 * stride] = shard.owns(target) ? to_float(row[target - shard.first]) : 0.0f;
}

// What a row of which nothing is read contributes.
inline void skip_row(float* to, int64_t stride) {
  to[0] = -INFINITY;
  to[stride] = to[2 * stride] = 0.0f;
}

// The k best logits and ids, descending; rest[0] and rest[stride]: the largest logit m and the sum of
// exp((z - m) / temperature) over the columns that are not among them. The second pass finds the row in the L2 cache.
template <class T>
void best_of_row(const Passes<T>& passes, const T* row, Shard shard, int64_t k, float inverse_temperature,
                 std::vector<int64_t>& skipped, float* values, int64_t* ids, float* rest, int64_t stride) {
  const int64_t held = passes.best(row, shard.valid, k, values, ids);
  skipped.assign(ids, ids + held);
  std::sort(skipped.begin(), skipped.end());
  const Sums sums = passes.outside(row, shard.valid, skipped.data(), held, inverse_temperature, false);
  for (int64_t i = 0; i < k; ++i) {
    if (i >= held) values[i] = -INFINITY;
    ids[i] = i < held ? ids[i] + shard.first : shard.first;
  }
  // Everything outside is at most values[0]; with nothing there (k = 0 too) the sums name their own maximum.
  const float max = held ? values[0] : sums.max;
  const double drop = sums.max == -INFINITY ? 0.0 : (static_cast<double>(sums.max) - max) * inverse_temperature;
  rest[0] = max;
  rest[stride] = static_cast<float>(sums.sum * std::exp(drop));
}

}  // namespace npd
