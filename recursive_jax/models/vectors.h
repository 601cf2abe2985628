// Vectors of floats, for what is written to run on any CPU and as fast as on this one.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __FMA__
#include <immintrin.h>
#endif

constexpr int64_t kLane = 8;  // floats of a vector

typedef float Vector __attribute__((vector_size(kLane * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLane * sizeof(int32_t))));

inline Vector Repeat(float number) {
  Vector v;  // a sum with zeros would be one more operation
  for (int i = 0; i < kLane; i++) v[i] = number;
  return v;
}

inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The first `count`, and zeros.
inline Vector Load(const float* from, int64_t count) {
  Vector v = {};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void Store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Rounded once, where the CPU can. Left to themselves compilers do so in some loops and not in
// others, and a row's numbers would depend on how many rows there are.
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) {
#ifdef __FMA__
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
