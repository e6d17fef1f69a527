// Sixteen floats in AVX-512. Included by isa.h inside the namespace and the compile target of this instruction set.

struct Vec {
  static constexpr int64_t width = 16;
  __m512 lanes;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

inline Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }

inline Vec load(const Bfloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

inline Vec load(const Half* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}

inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x.lanes); }

// By hand, because the instruction of AVX512-BF16 flushes subnormals and not every AVX-512 machine has it.
inline void store(Bfloat16* to, Vec x) {
  const __m512i bits = _mm512_castps_si512(x.lanes), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.lanes, x.lanes, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
}

inline void store(Half* to, Vec x) {
  const __m256i result = _mm512_cvtps_ph(x.lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), result);
}

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }

// a * b + c, a * b - c
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.lanes, b.lanes, c.lanes)}; }

// The larger of two numbers; `so_far` where `x` is NaN (the instruction returns its second operand then).
inline Vec larger(Vec x, Vec so_far) { return {_mm512_max_ps(x.lanes, so_far.lanes)}; }

// Bit i: lane i of x is above that of y. A NaN is above nothing.
inline uint32_t above(Vec x, Vec y) { return _mm512_cmp_ps_mask(x.lanes, y.lanes, _CMP_GT_OQ); }

inline Vec exp2_polynomial(Vec fraction);  // rows.h

// 2^x; 0 for -infinity, NaN for NaN. `reduce` gives x - floor(x), and `scalef` multiplies by 2^floor(x).
inline Vec exp2(Vec x) {
  const Vec fraction{_mm512_reduce_ps(x.lanes, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return {_mm512_scalef_ps(exp2_polynomial(fraction).lanes, x.lanes)};
}

inline float largest_lane(Vec x) { return _mm512_reduce_max_ps(x.lanes); }
inline float sum_of_lanes(Vec x) { return _mm512_reduce_add_ps(x.lanes); }
