// The dense passes over one row of logits, on `Vec`. Included by isa.h once per instruction set, inside its namespace
// and compile target, so that the algorithms are written once.
//
// A row is walked in blocks that stay in the L1 cache: the first loop over a block finds its maximum, the second sums,
// so every element comes from memory once. Sums are float32 inside a block (64 terms a lane) and float64
// across blocks.

constexpr int64_t kBlock = 256 * Vec::width;

inline Vec exp2_polynomial(Vec fraction) {
  Vec p = broadcast(kExp2Coefficients[5]);
  for (int degree = 4; degree >= 0; --degree) p = multiply_add(p, fraction, broadcast(kExp2Coefficients[degree]));
  return p;
}

// The `count` < width last elements, with -infinity (nothing, in every sum and maximum here) in the other lanes.
template <class T>
inline Vec load_last(const T* from, int64_t count) {
  T lanes[Vec::width];
  for (T& lane : lanes) lane = from_float<T>(-INFINITY);
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_last(T* to, Vec x, int64_t count) {
  T lanes[Vec::width];
  store(lanes, x);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
}

// Four independent accumulators, combined in a fixed order.
template <class T>
inline float block_max(const T* z, int64_t count) {
  Vec m0 = broadcast(-INFINITY), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * Vec::width <= count; i += 4 * Vec::width) {
    m0 = larger(load(z + i), m0);
    m1 = larger(load(z + i + Vec::width), m1);
    m2 = larger(load(z + i + 2 * Vec::width), m2);
    m3 = larger(load(z + i + 3 * Vec::width), m3);
  }
  for (; i + Vec::width <= count; i += Vec::width) m0 = larger(load(z + i), m0);
  if (i < count) m0 = larger(load_last(z + i, count - i), m0);
  return largest_lane(larger(larger(m0, m1), larger(m2, m3)));
}

// Sum of 2^((z - base) * scale). The difference comes first: it is exact near the maximum, however large both are.
template <class T>
inline float block_sum(const T* z, int64_t count, float base, float scale) {
  const Vec b = broadcast(base), k = broadcast(scale);
  Vec s0 = broadcast(0), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * Vec::width <= count; i += 4 * Vec::width) {
    s0 = s0 + exp2((load(z + i) - b) * k);
    s1 = s1 + exp2((load(z + i + Vec::width) - b) * k);
    s2 = s2 + exp2((load(z + i + 2 * Vec::width) - b) * k);
    s3 = s3 + exp2((load(z + i + 3 * Vec::width) - b) * k);
  }
  for (; i + Vec::width <= count; i += Vec::width) s0 = s0 + exp2((load(z + i) - b) * k);
  if (i < count) s0 = s0 + exp2((load_last(z + i, count - i) - b) * k);
  return sum_of_lanes((s0 + s1) + (s2 + s3));
}

// Add `count` columns to `sums`; `at_one` asks for sum_at_one too.
template <class T>
void absorb(Sums& sums, const T* z, int64_t count, float inverse_temperature, bool at_one) {
  const double log2e = kLog2E;
  const float scale = static_cast<float>(inverse_temperature * log2e);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = count - start < kBlock ? count - start : kBlock;
    const float max = block_max(z + start, length);
    if (max > sums.max) {
      const double rise = static_cast<double>(sums.max) - max;  // -infinity for the first block
      sums.sum *= std::exp2(rise * inverse_temperature * log2e);
      if (at_one) sums.sum_at_one *= std::exp2(rise * log2e);
      sums.max = max;
    }
    const float base = sums.max == -INFINITY ? 0.0f : sums.max;  // nothing but -infinity (or NaN) so far
    sums.sum += block_sum(z + start, length, base, scale);
    if (at_one) sums.sum_at_one += block_sum(z + start, length, base, static_cast<float>(log2e));
  }
}

// The sums over a row's columns except `skipped`, which ascend: the row is split there, and what is left is summed
// itself, never as a difference that would cancel.
template <class T>
Sums outside(const T* row, int64_t columns, const int64_t* skipped, int64_t skips, float inverse_temperature,
             bool at_one) {
  Sums sums;
  int64_t start = 0;
  for (int64_t i = 0; i < skips; ++i) {
    absorb(sums, row + start, skipped[i] - start, inverse_temperature, at_one);
    start = skipped[i] + 1;
  }
  absorb(sums, row + start, columns - start, inverse_temperature, at_one);
  return sums;
}

// Move what is smaller down and put `value` in place; the last one falls out. Equal ones keep their order.
inline void insert(float* values, int64_t* places, int64_t held, float value, int64_t column) {
  int64_t i = held;
  for (; i > 0 && values[i - 1] < value; --i) {
    values[i] = values[i - 1];
    places[i] = places[i - 1];
  }
  values[i] = value;
  places[i] = column;
}

// The k largest logits of a row and their columns, descending, the lowest column first among equals; NaN is never one
// of them. Returns how many there are: fewer than k only where the row has fewer. Most blocks hold nothing above the
// k-th best so far and cost one maximum.
template <class T>
int64_t best(const T* row, int64_t columns, int64_t k, float* values, int64_t* places) {
  int64_t held = 0, first = 0;
  for (; first < columns && held < k; ++first) {
    const float z = to_float(row[first]);
    if (!std::isnan(z)) insert(values, places, held++, z, first);
  }
  for (int64_t start = first; start < columns && k > 0; start += kBlock) {
    const int64_t end = columns - start < kBlock ? columns : start + kBlock;
    if (!(block_max(row + start, end - start) > values[k - 1])) continue;
    for (int64_t i = start; i < end; i += Vec::width) {
      const Vec z = i + Vec::width <= end ? load(row + i) : load_last(row + i, end - i);
      for (uint32_t found = above(z, broadcast(values[k - 1])); found; found &= found - 1) {
        const int64_t column = i + __builtin_ctz(found);
        const float value = to_float(row[column]);
        if (value > values[k - 1]) insert(values, places, k - 1, value, column);  // the threshold may have risen
      }
    }
  }
  return held;
}

inline Vec on_curve(Vec z, const Curve& curve) {
  const Vec exponent = multiply_subtract(z, broadcast(curve.inverse_temperature), broadcast(curve.log_sum));
  return broadcast(curve.weight) * exp2(exponent * broadcast(static_cast<float>(kLog2E)));
}

// Overwrite a row's logits by `tail`, plus `whole` where `both`.
template <class T>
void overwrite(T* row, int64_t columns, Curve tail, Curve whole, bool both) {
  int64_t i = 0;
  if (both) {
    for (; i + Vec::width <= columns; i += Vec::width) {
      const Vec z = load(row + i);
      store(row + i, on_curve(z, tail) + on_curve(z, whole));
    }
  } else {
    for (; i + Vec::width <= columns; i += Vec::width) store(row + i, on_curve(load(row + i), tail));
  }
  if (i == columns) return;
  const Vec z = load_last(row + i, columns - i);
  const Vec result = both ? on_curve(z, tail) + on_curve(z, whole) : on_curve(z, tail);
  store_last(row + i, result, columns - i);
}

// The table by which code outside the compile target calls in.
template <class T>
constexpr Passes<T> passes() {
  return {&outside<T>, &best<T>, &overwrite<T>};
}

constexpr InstructionSet instruction_set(const char* name) {
  return {name, passes<float>(), passes<Bfloat16>(), passes<Half>()};
}
