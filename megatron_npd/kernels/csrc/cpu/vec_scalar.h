// Four floats in what every target of the compiler has (its vector extension). Included by isa.h inside a namespace.

typedef float FourFloats __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

struct Vec {
  static constexpr int64_t width = 4;
  FourFloats lanes;
};

inline Vec broadcast(float x) { return {FourFloats{x, x, x, x}}; }

template <class T>
inline Vec load(const T* from) {
  return {FourFloats{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])}};
}

template <class T>
inline void store(T* to, Vec x) {
  for (int i = 0; i < Vec::width; ++i) to[i] = from_float<T>(x.lanes[i]);
}

inline Vec operator+(Vec a, Vec b) { return {a.lanes + b.lanes}; }
inline Vec operator-(Vec a, Vec b) { return {a.lanes - b.lanes}; }
inline Vec operator*(Vec a, Vec b) { return {a.lanes * b.lanes}; }

// a * b + c, a * b - c
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {a.lanes * b.lanes + c.lanes}; }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return {a.lanes * b.lanes - c.lanes}; }

// The larger of two numbers; `so_far` where `x` is NaN.
inline Vec larger(Vec x, Vec so_far) { return {x.lanes > so_far.lanes ? x.lanes : so_far.lanes}; }

// Bit i: lane i of x is above that of y. A NaN is above nothing.
inline uint32_t above(Vec x, Vec y) {
  const FourInts is_above = x.lanes > y.lanes;
  return (is_above[0] & 1u) | (is_above[1] & 2u) | (is_above[2] & 4u) | (is_above[3] & 8u);
}

inline Vec exp2_polynomial(Vec fraction);  // rows.h

// 2^x for x < 128; 0 below 2^-126 and for -infinity, NaN for NaN.
inline Vec exp2(Vec x) {
  const FourFloats lowest = broadcast(kExp2Underflow).lanes;
  x.lanes = x.lanes < lowest ? lowest : x.lanes;  // a NaN stays
  const FourFloats shift = broadcast(0x1.8p23f).lanes;  // adding it rounds to an integer
  const FourFloats nearest = (x.lanes + shift) - shift;
  const FourFloats floor = nearest + __builtin_convertvector(nearest > x.lanes, FourFloats);  // true is -1
  const FourInts exponent = __builtin_convertvector(floor, FourInts) + 127;
  const Vec power{bit_cast<FourFloats>(exponent << 23)};
  return exp2_polynomial({x.lanes - floor}) * power;
}

inline float largest_lane(Vec x) {
  float largest = x.lanes[0];
  for (int i = 1; i < Vec::width; ++i) largest = x.lanes[i] > largest ? x.lanes[i] : largest;
  return largest;
}

inline float sum_of_lanes(Vec x) { return (x.lanes[0] + x.lanes[1]) + (x.lanes[2] + x.lanes[3]); }
