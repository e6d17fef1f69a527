// Eight floats in AVX2 with FMA and F16C. Included by isa.h inside the namespace and the compile target of this set.

struct Vec {
  static constexpr int64_t width = 8;
  __m256 lanes;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

inline Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }

inline Vec load(const Bfloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

inline Vec load(const Half* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}

inline void store(float* to, Vec x) { _mm256_storeu_ps(to, x.lanes); }

inline void store(Bfloat16* to, Vec x) {
  const __m256i bits = _mm256_castps_si256(x.lanes), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.lanes, x.lanes, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, is_nan);
  // The lower and upper half become 16-bit lanes side by side.
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

inline void store(Half* to, Vec x) {
  const __m128i result = _mm256_cvtps_ph(x.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), result);
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }

// a * b + c, a * b - c
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.lanes, b.lanes, c.lanes)}; }

// The larger of two numbers; `so_far` where `x` is NaN (the instruction returns its second operand then).
inline Vec larger(Vec x, Vec so_far) { return {_mm256_max_ps(x.lanes, so_far.lanes)}; }

// Bit i: lane i of x is above that of y. A NaN is above nothing.
inline uint32_t above(Vec x, Vec y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.lanes, y.lanes, _CMP_GT_OQ)));
}

inline Vec exp2_polynomial(Vec fraction);  // rows.h

// 2^x for x < 128; 0 below 2^-126 and for -infinity, NaN for NaN.
inline Vec exp2(Vec x) {
  x = {_mm256_max_ps(_mm256_set1_ps(kExp2Underflow), x.lanes)};  // in this order a NaN stays
  const __m256 floor = _mm256_floor_ps(x.lanes);
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127));
  const Vec power{_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
  return exp2_polynomial({_mm256_sub_ps(x.lanes, floor)}) * power;
}

inline float largest_lane(Vec x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x.lanes), _mm256_extractf128_ps(x.lanes, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline float sum_of_lanes(Vec x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x.lanes), _mm256_extractf128_ps(x.lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
