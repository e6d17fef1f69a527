// What single device operations do, for g++. Included by core.h inside namespace npd where nvcc is not the compiler.
//
// exp2_fast errs on purpose, by up to the 2^-22 that ex2.approx.ftz.f32 may, in a direction drawn from its argument, so
// that a test which passes here does not rely on the host's better exponential.
NPD_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
NPD_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
NPD_DEVICE float mul(float a, float b) { return a * b; }
NPD_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
NPD_DEVICE float max_of(float a, float b) { return a != a || b > a ? (b != b ? a : b) : a; }

NPD_DEVICE float exp2_fast(float x) {
  if (std::fabs(x) < 0x1p-126f) return 1.f;  // denormal arguments are flushed
  const float exact = ::exp2f(x);
  const float drawn = static_cast<float>(static_cast<int32_t>(bits_of(x) * 2654435761u)) * 0x1p-31f;  // [-1, 1)
  const float y = exact + exact * (drawn * 0x1p-22f);
  return y < 0x1p-126f ? 0.f : exact == INFINITY ? exact : y;
}

NPD_DEVICE float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}
NPD_DEVICE uint32_t round_to_half(float x) {
  const _Float16 rounded = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
NPD_DEVICE uint32_t round_to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
NPD_DEVICE uint32_t pack_bfloat16(float low, float high) {
  return round_to_bfloat16(high) << 16 | round_to_bfloat16(low);
}
NPD_DEVICE uint32_t pack_half(float low, float high) { return round_to_half(high) << 16 | round_to_half(low); }
NPD_DEVICE int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }
NPD_DEVICE int count_bits(uint32_t mask) { return __builtin_popcount(mask); }
