// The arithmetic of the CUDA kernels: element types, running sums of exponentials, candidates of a top-k, and which
// columns of a row belong to whom. No torch and no CUDA header: nvcc compiles it for the device, g++ for the host
// emulation (emulation.cpp), and both run the same operations in the same order.
//
// Every product that feeds a sum is written as mul() or fma(): nvcc must not decide what is contracted, as the rounding
// of a product is corrected later (g++ is told so by -ffp-contract=off).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define NPD_DEVICE __device__ __forceinline__
#define NPD_BOTH __host__ __device__ __forceinline__
#define NPD_UNROLL _Pragma("unroll")
#else
#define NPD_DEVICE inline __attribute__((always_inline))
#define NPD_BOTH NPD_DEVICE
#define NPD_UNROLL
#endif

namespace npd {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kWarp = 32;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

// ---- Single operations -------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
NPD_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
NPD_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
NPD_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }  // the other one where one is NaN
NPD_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
NPD_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
NPD_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
NPD_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// Two floats, rounded to nearest even, in one word; `low` in its lower half.
NPD_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
NPD_DEVICE uint32_t pack_half(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
NPD_DEVICE int lowest_bit(uint32_t mask) { return __ffs(mask) - 1; }
NPD_DEVICE int count_bits(uint32_t mask) { return __popc(mask); }
#else
#include "emulated_operations.h"
#endif

// ---- Elements and vectors of 16 bytes ------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct alignas(16) Vector {
  uint32_t word[4];
};

template <class T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

NPD_DEVICE float to_float(float x) { return x; }
NPD_DEVICE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
NPD_DEVICE float to_float(Float16 x) { return half_to_float(x.bits); }

NPD_DEVICE void store(float* to, float x) { *to = x; }
NPD_DEVICE void store(BFloat16* to, float x) { to->bits = static_cast<uint16_t>(pack_bfloat16(x, 0.f)); }
NPD_DEVICE void store(Float16* to, float x) { to->bits = static_cast<uint16_t>(pack_half(x, 0.f)); }

template <class T>
NPD_DEVICE void unpack(const Vector& v, float* z) {
  NPD_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      z[i] = float_of(v.word[i]);
    } else {
      z[2 * i] = to_float(T{static_cast<uint16_t>(v.word[i])});
      z[2 * i + 1] = to_float(T{static_cast<uint16_t>(v.word[i] >> 16)});
    }
  }
}

template <class T>
NPD_DEVICE Vector pack(const float* z) {
  Vector v;
  NPD_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v.word[i] = bits_of(z[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      v.word[i] = pack_bfloat16(z[2 * i], z[2 * i + 1]);
    } else {
      v.word[i] = pack_half(z[2 * i], z[2 * i + 1]);
    }
  }
  return v;
}

// ---- Rows of a vocabulary shard, and slices of a row ---------------------------------------------------------------

// Logits [rows, columns] of a rank that owns the ids [first, first + valid); columns from `valid` on are padding.
template <class T>
struct Logits {
  T* data;
  int64_t stride;
  int64_t rows;
  int columns;
  int valid;
  int64_t first;

  NPD_BOTH T* row(int64_t r) const { return data + r * stride; }  // rows * columns passes 2^32

  // The local column of a global id, -1 for an id of another rank: it must not alias a column here.
  NPD_BOTH int column_of(int64_t id) const {
    const uint64_t offset = static_cast<uint64_t>(id) - static_cast<uint64_t>(first);
    return offset < static_cast<uint64_t>(valid) ? static_cast<int>(offset) : -1;
  }
};

// One block's part of a row: the aligned vectors [begin, end) of `vectors`. The first slice also has the ragged ends:
// `head` columns before the first 16-byte boundary (rows of 153,376 / 8 columns are only 8-byte aligned) and the valid
// ones after the last whole vector.
template <class T>
struct Slice {
  int head, vectors, begin, end, valid;
  bool first;

  NPD_BOTH static Slice of(const T* row, int valid, int split, int splits) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) & 15);
    const int to_boundary = ((16 - misaligned) & 15) / static_cast<int>(sizeof(T));
    const int head = to_boundary < valid ? to_boundary : valid;
    const int vectors = (valid - head) / kPerVector<T>;
    const int each = (vectors + splits - 1) / splits;
    const int begin = split * each < vectors ? split * each : vectors;
    const int end = begin + each < vectors ? begin + each : vectors;
    return {head, vectors, begin, end, valid, split == 0};
  }

  NPD_BOTH int column(int vector) const { return head + vector * kPerVector<T>; }
  NPD_BOTH int ragged() const { return first ? valid - vectors * kPerVector<T> : 0; }
  NPD_BOTH int ragged_column(int i) const { return i < head ? i : i + vectors * kPerVector<T>; }
  NPD_BOTH bool in_vectors(int c) const { return c >= column(begin) && c < column(end); }
  NPD_BOTH bool in_ragged(int c) const { return first && c >= 0 && (c < head || c >= column(vectors)); }
  NPD_BOTH bool holds(int c) const { return in_vectors(c) || in_ragged(c); }
};

// ---- Running sums of exponentials at M temperatures ----------------------------------------------------------------

template <int M>
struct Scale {
  float k[M];  // log2(e) / temperature
};

// Σ exp((z - max) / temperature) over what was absorbed. `max` is raw, never multiplied: storing max·k instead costs
// 3.6e-5 in the result at offsets of 500.
template <int M>
struct Sum {
  float max;
  float sum[M];
};

template <int M>
NPD_DEVICE Sum<M> empty_sum() {
  Sum<M> s;
  s.max = -INFINITY;
  NPD_UNROLL
  for (int i = 0; i < M; ++i) s.sum[i] = 0.f;
  return s;
}

// -inf - -inf is NaN; a slice of nothing but -inf must stay a sum of 0.
NPD_DEVICE float finite_max(float max) { return max == -INFINITY ? 0.f : max; }

// Add N logits. Until settle(), sums are relative to round(max·k), so that the exponent of a term is a single fma; the
// earlier sum is rescaled once per call.
template <int N, int M>
NPD_DEVICE void absorb(Sum<M>& s, const float* z, const Scale<M>& scale) {
  float max = s.max;
  NPD_UNROLL
  for (int i = 0; i < N; ++i) max = max_of(max, z[i]);
  NPD_UNROLL
  for (int m = 0; m < M; ++m) {
    const float k = scale.k[m], shift = mul(finite_max(max), k);
    float even = 0.f, odd = 0.f;  // two chains hide the latency of an addition
    NPD_UNROLL
    for (int i = 0; i < N; i += 2) {
      even += exp2_fast(fma(z[i], k, -shift));
      if (i + 1 < N) odd += exp2_fast(fma(z[i + 1], k, -shift));
    }
    s.sum[m] = fma(s.sum[m], exp2_fast(mul(s.max, k) - shift), even + odd);
  }
  s.max = max;
}

// Undo the rounding of max·k: sums become relative to max itself.
template <int M>
NPD_DEVICE void settle(Sum<M>& s, const Scale<M>& scale) {
  const float max = finite_max(s.max);
  NPD_UNROLL
  for (int m = 0; m < M; ++m) {
    const float rounded = mul(max, scale.k[m]);
    s.sum[m] = mul(s.sum[m], exp2_fast(-fma(max, scale.k[m], -rounded)));
  }
}

// The sum of two settled sums.
template <int M>
NPD_DEVICE Sum<M> merge(const Sum<M>& a, const Sum<M>& b, const Scale<M>& scale) {
  Sum<M> s;
  s.max = max_of(a.max, b.max);
  const float max = finite_max(s.max);
  NPD_UNROLL
  for (int m = 0; m < M; ++m) {
    const float right = mul(b.sum[m], exp2_fast(mul(b.max - max, scale.k[m])));
    s.sum[m] = fma(a.sum[m], exp2_fast(mul(a.max - max, scale.k[m])), right);
  }
  return s;
}

// ---- Candidates of a top-k -----------------------------------------------------------------------------------------

// A value and its column as one integer: greater is better, the lower column of equal values. 0 is no candidate; it is
// below every value, -inf included. Values are never NaN.
NPD_DEVICE uint64_t key_of(float value, int column) {
  const uint32_t bits = bits_of(value + 0.f);  // -0 equals 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~column);
}
NPD_DEVICE float value_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return float_of(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
NPD_DEVICE int column_of(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// How many of `size` descending keys are greater.
NPD_DEVICE int count_greater(const uint64_t* keys, int size, uint64_t key) {
  int low = 0, high = size;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (keys[middle] > key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace npd
