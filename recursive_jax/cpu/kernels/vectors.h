// Vectors of floats that compile on any CPU, to its vector instructions where it has them.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#ifdef __FMA__
#include <immintrin.h>
#endif

constexpr int64_t kLane = 8;   // floats of a vector
constexpr int64_t kLine = 16;  // of a line of a CPU's cache

typedef float Vector __attribute__((vector_size(kLane * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLane * sizeof(int32_t))));

template <class V = Vector>
inline V Repeat(float number) {
  V v;  // a sum with zeros would be one more operation
  for (int64_t i = 0; i < kLane; i++) v[i] = number;
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

// Rows become columns.
inline void Transpose(Vector (&rows)[kLane]) {
#ifdef __FMA__
  Vector twos[kLane], fours[kLane];  // numbers of as many rows stand side by side
  for (int r = 0; r < 8; r += 2) {
    twos[r] = _mm256_unpacklo_ps(rows[r], rows[r + 1]);
    twos[r + 1] = _mm256_unpackhi_ps(rows[r], rows[r + 1]);
  }
  for (int r = 0; r < 8; r += 2) {
    const int from = r < 4 ? r / 2 : r / 2 + 2;  // 0, 1, 4, 5
    fours[r] = _mm256_shuffle_ps(twos[from], twos[from + 2], 0x44);
    fours[r + 1] = _mm256_shuffle_ps(twos[from], twos[from + 2], 0xee);
  }
  for (int r = 0; r < 4; r++) {
    rows[r] = _mm256_permute2f128_ps(fours[r], fours[r + 4], 0x20);
    rows[r + 4] = _mm256_permute2f128_ps(fours[r], fours[r + 4], 0x31);
  }
#else
  for (int64_t r = 0; r < kLane; r++) {
    for (int64_t i = 0; i < r; i++) {
      const float number = rows[r][i];
      rows[r][i] = rows[i][r], rows[i][r] = number;
    }
  }
#endif
}

#ifdef __AVX512F__
typedef float LongVector __attribute__((vector_size(2 * sizeof(Vector))));

template <>
inline LongVector Repeat(float number) {
  return _mm512_set1_ps(number);
}

inline LongVector MultiplyAdd(LongVector a, LongVector b, LongVector c) {
  return _mm512_fmadd_ps(a, b, c);
}
#endif

// e^x for x <= 0, to a few units in the last place; below 1e-38 it stays there.
inline Vector Exp(Vector x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: what is added to it loses its fraction
  x = x < Repeat(-87) ? Repeat(-87) : x;
  const Vector shifted = MultiplyAdd(x, Repeat(1.44269504f), Repeat(kRound));
  const Vector n = shifted - Repeat(kRound);
  const Vector r = MultiplyAdd(n, Repeat(2.12194440e-4f), MultiplyAdd(n, Repeat(-0.693359375f), x));
  Vector y = Repeat(1.f / 720);
  for (float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = MultiplyAdd(y, r, Repeat(c));
  return y * (Vector)(((Integers)shifted + 127) << 23);  // n stands in the last bits
}

inline float Exp(float x) { return Exp(Repeat(x))[0]; }
