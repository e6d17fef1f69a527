// One build for every CPU: the passes of rows.h compiled for each instruction set, chosen when the library is used.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "element.h"
#include "exp2_polynomial.h"
#include "sums.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace npd {

// Signatures and meaning: rows.h.
template <class T>
struct Passes {
  Sums (*outside)(const T* row, int64_t columns, const int64_t* skipped, int64_t skips, float inverse_temperature,
                  bool at_one);
  int64_t (*best)(const T* row, int64_t columns, int64_t k, float* values, int64_t* places);
  void (*overwrite)(T* row, int64_t columns, Curve tail, Curve whole, bool both);
};

struct InstructionSet {
  const char* name;
  Passes<float> float32;
  Passes<Bfloat16> bfloat16;
  Passes<Half> float16;

  const Passes<float>& passes(float) const { return float32; }
  const Passes<Bfloat16>& passes(Bfloat16) const { return bfloat16; }
  const Passes<Half>& passes(Half) const { return float16; }
};

namespace scalar {
#include "vec_scalar.h"
//
#include "rows.h"
}  // namespace scalar

#if defined(__x86_64__)

#if defined(__clang__)
#define NPD_BEGIN_TARGET(features) \
  _Pragma(NPD_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define NPD_END_TARGET _Pragma("clang attribute pop")
#else
#define NPD_BEGIN_TARGET(features) _Pragma("GCC push_options") _Pragma(NPD_STRING(GCC target(features)))
#define NPD_END_TARGET _Pragma("GCC pop_options")
#endif
#define NPD_STRING(...) #__VA_ARGS__

NPD_BEGIN_TARGET("avx2,fma,f16c")
namespace avx2 {
#include "vec_avx2.h"
//
#include "rows.h"
}  // namespace avx2
NPD_END_TARGET

NPD_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "vec_avx512.h"
//
#include "rows.h"
}  // namespace avx512
NPD_END_TARGET

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#endif

struct Choice {
  InstructionSet set;
  bool runs_here;
};

// Best first.
inline const Choice* choices(int& count) {
  static const Choice all[] = {
#if defined(__x86_64__)
      {avx512::instruction_set("avx512"), has_avx512()},
      {avx2::instruction_set("avx2"), has_avx2()},
#endif
      {scalar::instruction_set("scalar"), true},
  };
  count = sizeof all / sizeof *all;
  return all;
}

// The set of this name, or the best one that runs here for an empty name. Throws std::invalid_argument.
inline const InstructionSet& find_instruction_set(const std::string& name) {
  int count;
  const Choice* all = choices(count);
  for (int i = 0; i < count; ++i) {
    if (name.empty() ? !all[i].runs_here : name != all[i].set.name) continue;
    if (!all[i].runs_here) throw std::invalid_argument("'" + name + "': this machine has no such instructions");
    return all[i].set;
  }
  throw std::invalid_argument("'" + name + "': must be scalar, avx2 or avx512");
}

inline std::atomic<const InstructionSet*>& current_instruction_set() {
  static std::atomic<const InstructionSet*> current{&find_instruction_set("")};
  return current;
}

}  // namespace npd
