// How a block walks its slice of a row.
//
// Bytes in flight. Little's law at HBM3: 3.35 TB/s (H100) x 0.65 us of loaded latency = 2.2 MB, over 132
// multiprocessors 16 KB each; H200 at 4.8 TB/s 24 KB; B200 at 8 TB/s over 148 some 36 KB. A block of 512 threads with
// kUnroll = 4 loads of 16 bytes has 32 KB in flight, and two blocks fit on a multiprocessor (at most 64 registers), so
// one loads while the other computes.
//
// Arithmetic. At 3.35 TB/s a multiprocessor receives 7.2 bfloat16 a clock and has 16 exponentials a clock: 45 % of
// them (H200 65 %, B200 nearly 90 %; twice that where a second temperature needs its own exponential, which then is the
// limit on H200 and B200).
#pragma once

#include "lane.cuh"

namespace npd {

constexpr int kUnroll = 4;
template <class T>
constexpr int kPerRound = kUnroll * kPerVector<T>;

#if defined(__CUDACC__)
// Read once by the whole kernel and never written by it: past the read-only path, without a line of L1.
NPD_DEVICE Vector load_streaming(const Vector* p) {
  Vector v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
// The same where this kernel overwrites what it read: .nc would be undefined.
NPD_DEVICE Vector load_before_store(const Vector* p) {
  Vector v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p)
               : "memory");
  return v;
}
NPD_DEVICE void store_vector(Vector* p, const Vector& v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
#endif

// Calls whole(z, i) with kPerRound logits of the vectors i, i + kThreads, ... of this thread as long as all kUnroll are
// there, then single(z, i) with kPerVector logits for each of the rest, whose loads are all issued before the first is
// used.
template <class T, class Whole, class Single>
NPD_DEVICE void for_each_vector(const T* row, const Slice<T>& slice, Whole whole, Single single) {
  const Vector* vectors = reinterpret_cast<const Vector*>(row + slice.head);
  constexpr int N = kPerVector<T>;
  int i = slice.begin + thread();
  for (; i + (kUnroll - 1) * kThreads < slice.end; i += kUnroll * kThreads) {
    Vector v[kUnroll];
    float z[kUnroll * N];
    NPD_UNROLL
    for (int u = 0; u < kUnroll; ++u) v[u] = load_streaming(vectors + i + u * kThreads);
    NPD_UNROLL
    for (int u = 0; u < kUnroll; ++u) unpack<T>(v[u], z + u * N);
    whole(z, i);
  }
  Vector v[kUnroll - 1];
  NPD_UNROLL
  for (int u = 0; u < kUnroll - 1; ++u) {
    if (i + u * kThreads < slice.end) v[u] = load_streaming(vectors + i + u * kThreads);
  }
  NPD_UNROLL
  for (int u = 0; u < kUnroll - 1; ++u) {
    if (i + u * kThreads < slice.end) {
      float z[N];
      unpack<T>(v[u], z);
      single(z, i + u * kThreads);
    }
  }
}

// Blocks a row is divided among. A few rows would leave multiprocessors idle: aim at four blocks for each, of at least
// one whole round. Depends on the shape and the device alone, so results repeat.
inline int splits_of(int64_t rows, int64_t columns, int per_vector, int multiprocessors) {
  const int64_t wanted = (4 * static_cast<int64_t>(multiprocessors) + rows - 1) / rows;
  const int64_t rounds = columns / (static_cast<int64_t>(kThreads) * kUnroll * per_vector);
  const int64_t splits = wanted < rounds ? wanted : rounds;
  return static_cast<int>(splits < 1 ? 1 : splits > 64 ? 64 : splits);
}

}  // namespace npd
