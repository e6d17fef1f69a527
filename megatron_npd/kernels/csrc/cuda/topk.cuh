// topk: a rank's k best columns of each row and the sum of exponentials over all others, in one read.
//
// One read, because a second would come from HBM again: the rows that an H100 works on at a time (2 blocks on each of
// 132 multiprocessors, 300 KB a row at 153,376 columns of bfloat16) are 80 MB, its L2 50 MB.
//
// Each warp collects candidates of its own columns in a list in shared memory; whatever cannot be among the k best
// goes into the thread's running sum at once, and what falls out of a list later goes there then. So every column is
// added exactly once, to the list or to the sum, and the sum is never a difference. A list that fills up is cut to its
// k best. No atomics, no order that depends on timing.
//
// The bar that a logit has to clear is the k-th best of 128 groups of the columns seen so far: at least k columns are
// that good, so nothing below it can be among the best. It is set in the first round and raised in two later ones. Of
// 153,376 random bfloat16 logits some 50 clear it at k = 10 (the bar of the first round alone: 190) and 450 at k = 64;
// 15 and 62 % of the warps' rounds hold one and take the longer path.
//
// Bytes in flight (load.cuh): 2 loads of 16 bytes a thread, issued a round ahead of their use, so 16 KB a block and 32
// KB a multiprocessor at all times.
#pragma once

#include "load.cuh"
#include "reduce.cuh"

namespace npd {

constexpr int kMaxTop = 64;
constexpr int kListSize = 128;  // a full list is cut to kMaxTop and then has room for a candidate from every lane
constexpr int kGroups = 128;
constexpr int kTopUnroll = 2;  // 16 bits of hits, 16 logits: leaves registers for the lists
template <class T>
constexpr int kPerTopRound = kTopUnroll * kPerVector<T>;

static_assert(kListSize >= kMaxTop + kWarp && kGroups >= kMaxTop && kThreads == 4 * kGroups);

template <class T>
struct TopkArguments {
  Logits<const T> logits;
  int k;
  Scale<1> scale;
  float* values;  // [rows, k]
  int64_t* ids;   // [rows, k]
  float* rest;    // [2, rows]: the row's largest logit m, Σ exp((z - m) / temperature) over all but the k best
};

struct TopkShared {
  uint64_t lists[kWarps][kListSize];
  float groups[kGroups];
  float bar;
  Sum<1> warps[kWarps];
};

// A warp's candidates, the same in every lane.
struct Candidates {
  uint64_t* keys;  // shared memory
  int count;
  float bar;       // the value to beat,
  int bar_column;  // and the column it was in: an equal value counts only if its column is lower

  // Without && and ||: every logit of a round is asked, and 16 branches cost more than 16 comparisons.
  NPD_DEVICE bool beaten_by(float z, int column) const { return (z > bar) | ((z == bar) & (column < bar_column)); }
};

// Sort the list and cut it to its k best; the others enter the lanes' sums. Keys are distinct, so ranks are.
NPD_DEVICE void cut(Candidates& list, int k, Sum<1>& rest, const Scale<1>& scale) {
  uint64_t mine[kListSize / kWarp];
  int rank[kListSize / kWarp];
  NPD_UNROLL
  for (int i = 0; i < kListSize / kWarp; ++i) {
    const int at = lane() + i * kWarp;
    mine[i] = at < list.count ? list.keys[at] : 0;
    rank[i] = 0;
  }
  for (int j = 0; j < list.count; ++j) {
    const uint64_t other = list.keys[j];
    NPD_UNROLL
    for (int i = 0; i < kListSize / kWarp; ++i) rank[i] += other > mine[i];
  }
  sync_warp();
  NPD_UNROLL
  for (int i = 0; i < kListSize / kWarp; ++i) {
    if (!mine[i]) continue;
    if (rank[i] < k) {
      list.keys[rank[i]] = mine[i];
    } else {
      const float z = value_of(mine[i]);
      absorb<1>(rest, &z, scale);
    }
  }
  sync_warp();
  if (list.count < k) return;
  list.count = k;
  list.bar = value_of(list.keys[k - 1]);
  list.bar_column = column_of(list.keys[k - 1]);
}

// Raise the bar to the k-th best of the groups' maxima so far, `seen` by each thread: at least k columns are as good.
NPD_DEVICE void raise_bar(Candidates& list, float seen, int k, TopkShared& shared) {
  seen = max_of(seen, shuffle_xor(seen, 1));
  seen = max_of(seen, shuffle_xor(seen, 2));
  if (thread() % 4 == 0) shared.groups[thread() / 4] = seen;
  sync_block();
  if (thread() < kGroups) {
    const float mine = shared.groups[thread()];
    int rank = 0;
    for (int i = 0; i < kGroups; ++i) {
      rank += (shared.groups[i] > mine) | ((shared.groups[i] == mine) & (i < thread()));
    }
    if (rank == k - 1) shared.bar = mine;
  }
  sync_block();
  if (shared.bar <= list.bar) return;
  list.bar = shared.bar;
  list.bar_column = 0x7fffffff;
}

// A round's logits of a lane and the columns they come from.
template <class T>
struct TopRound {
  float z[kPerTopRound<T>];
  uint32_t present;  // bits of the logits that exist; the others are -inf
  int first_column;

  NPD_DEVICE int column(int e) const {
    return first_column + e / kPerVector<T> * (kThreads * kPerVector<T>) + e % kPerVector<T>;
  }
  NPD_DEVICE float at(int e) const {  // registers have no index
    float x = z[0];
    NPD_UNROLL
    for (int i = 1; i < kPerTopRound<T>; ++i) x = i == e ? z[i] : x;
    return x;
  }
  NPD_DEVICE float max() const {
    float x = z[0];
    NPD_UNROLL
    for (int i = 1; i < kPerTopRound<T>; ++i) x = max_of(x, z[i]);
    return x;
  }
};

// A lane's vectors of a round. Loaded a round ahead, so that the next ones are in flight during this one.
template <class T>
struct TopVectors {
  Vector v[kTopUnroll];

  NPD_DEVICE static int index(const Slice<T>& slice, int round, int u) {
    return slice.begin + (round * kTopUnroll + u) * kThreads + thread();
  }
  NPD_DEVICE void load(const T* row, const Slice<T>& slice, int round) {
    const Vector* vectors = reinterpret_cast<const Vector*>(row + slice.head);
    NPD_UNROLL
    for (int u = 0; u < kTopUnroll; ++u) {
      const int i = index(slice, round, u);
      v[u] = {};
      if (i < slice.end) v[u] = load_streaming(vectors + i);
    }
  }
};

// The logits of a round's vectors, or after the last round the ragged ones.
template <class T>
NPD_DEVICE void unpack_round(TopRound<T>& r, const TopVectors<T>& vectors, const T* row, const Slice<T>& slice,
                             int round, int rounds) {
  constexpr int N = kPerVector<T>;
  r.present = 0;
  r.first_column = slice.column(TopVectors<T>::index(slice, round, 0));
  NPD_UNROLL
  for (int u = 0; u < kTopUnroll; ++u) {
    const bool there = TopVectors<T>::index(slice, round, u) < slice.end;
    unpack<T>(vectors.v[u], r.z + u * N);
    NPD_UNROLL
    for (int e = 0; e < N; ++e) r.z[u * N + e] = there ? r.z[u * N + e] : -INFINITY;
    r.present |= there ? ((1u << N) - 1) << u * N : 0;
  }
  if (round == rounds && thread() < slice.ragged()) {
    r.first_column = slice.ragged_column(thread());
    r.z[0] = to_float(row[r.first_column]);
    r.present = 1;
  }
}

// Move the logits of a round that clear the bar into the list, all others into the sum. All lanes of a warp together.
template <class T>
NPD_DEVICE void take(Candidates& list, TopRound<T>& r, int k, Sum<1>& rest, const Scale<1>& scale) {
  if (ballot(r.present && r.max() >= list.bar)) {
    uint32_t hits = 0;
    NPD_UNROLL
    for (int e = 0; e < kPerTopRound<T>; ++e) hits |= list.beaten_by(r.z[e], r.column(e)) ? 1u << e : 0;
    const uint32_t taken = hits &= r.present;
    while (uint32_t lanes = ballot(hits != 0)) {
      if (list.count + count_bits(lanes) > kListSize) cut(list, k, rest, scale);
      if (hits) {
        const int e = lowest_bit(hits);
        list.keys[list.count + count_bits(lanes & ((1u << lane()) - 1))] = key_of(r.at(e), r.column(e));
        hits &= hits - 1;
      }
      list.count += count_bits(lanes);
      sync_warp();
    }
    NPD_UNROLL
    for (int e = 0; e < kPerTopRound<T>; ++e) r.z[e] = taken >> e & 1 ? -INFINITY : r.z[e];
  }
  absorb<kPerTopRound<T>>(rest, r.z, scale);
}

// Merge the warps' descending lists of k keys pairwise into the first one; what falls out enters the threads' sums. An
// element's place is its place in its own list plus the number of better ones in the other.
NPD_DEVICE void merge_lists(TopkShared& shared, int k, Sum<1>& rest, const Scale<1>& scale) {
  constexpr int kEach = kMaxTop / kWarp;
  for (int half = kWarps / 2; half; half /= 2) {
    uint64_t key[kEach];
    int place[kEach];
    const bool active = warp() < 2 * half;
    sync_block();
    NPD_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int at = lane() + i * kWarp;
      key[i] = 0;
      place[i] = kMaxTop;
      if (!active || at >= k) continue;
      key[i] = shared.lists[warp()][at];
      place[i] = at + count_greater(shared.lists[warp() ^ half], k, key[i]);
    }
    sync_block();
    NPD_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (place[i] < k) {
        shared.lists[warp() % half][place[i]] = key[i];
      } else if (key[i]) {
        const float z = value_of(key[i]);
        absorb<1>(rest, &z, scale);
      }
    }
  }
  sync_block();
}

// One block for each row, however few: alone on its multiprocessor it reads 300 KB in some 12 us.
template <class T>
NPD_KERNEL topk_rows(TopkArguments<T> a) {
  auto& shared = *reinterpret_cast<TopkShared*>(shared_bytes());
  const int64_t row = block_row();
  const T* logits = a.logits.row(row);
  const auto slice = Slice<T>::of(logits, a.logits.valid, 0, 1);
  const int rounds = (slice.vectors + kTopUnroll * kThreads - 1) / (kTopUnroll * kThreads);
  const Scale<1> scale = a.scale;
  Candidates list{shared.lists[warp()], 0, -INFINITY, 0x7fffffff};
  Sum<1> rest = empty_sum<1>();
  float seen = -INFINITY;
  TopVectors<T> vectors;
  vectors.load(logits, slice, 0);
  for (int round = 0; round <= rounds; ++round) {
    TopRound<T> r;
    unpack_round(r, vectors, logits, slice, round, rounds);
    vectors.load(logits, slice, round + 1);
    seen = max_of(seen, r.max());
    if (round == 0 || round == 2 || round == 8) raise_bar(list, seen, a.k, shared);
    take(list, r, a.k, rest, scale);
  }
  cut(list, a.k, rest, scale);
  for (int i = list.count + lane(); i < a.k; i += kWarp) list.keys[i] = 0;
  merge_lists(shared, a.k, rest, scale);
  for (int i = thread(); i < a.k; i += kThreads) {
    const uint64_t key = shared.lists[0][i];
    a.values[row * a.k + i] = key ? value_of(key) : -INFINITY;
    a.ids[row * a.k + i] = a.logits.first + (key ? column_of(key) : 0);
  }
  settle(rest, scale);
  rest = merge_block(rest, scale, shared.warps);
  if (thread() != 0) return;
  const uint64_t best = shared.lists[0][0];
  if (best) rest = merge(rest, Sum<1>{value_of(best), {0.f}}, scale);  // relative to the row's largest logit
  a.rest[row] = rest.max;
  a.rest[a.logits.rows + row] = rest.sum[0];
}

}  // namespace npd
