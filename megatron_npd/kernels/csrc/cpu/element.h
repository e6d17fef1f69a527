// The element types of logits and their scalar conversions. Headers of this folder know nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace npd {

struct Bfloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float x) { return x; }

inline float to_float(Bfloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  float magnitude;
  if (rest >= 0x7c00u) {  // infinity and NaN
    magnitude = bit_cast<float>(0x7f800000u | ((rest & 0x3ffu) << 13));
  } else if (rest < 0x400u) {  // subnormal: a multiple of 2^-24
    magnitude = static_cast<float>(rest) * 0x1p-24f;
  } else {
    magnitude = bit_cast<float>((rest << 13) + (112u << 23));
  }
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
}

// Rounding to nearest, ties to even; a NaN stays one.
template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  uint32_t rest;
  if (magnitude > 0x7f800000u) {
    rest = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    rest = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    rest = static_cast<uint32_t>(std::nearbyint(bit_cast<float>(magnitude) * 0x1p24f));
  } else {
    rest = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | rest)};
}

}  // namespace npd
