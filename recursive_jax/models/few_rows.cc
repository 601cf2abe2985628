// y = x wt^T for a few rows x [rows, in] and a large matrix wt [out, in], all float32, row-major.
//
// Reading wt is what takes the time, so it is read once, front to back, whatever the rows: kernels
// for large products first copy it into blocks, those for one row read it again for every row.
// Each number of y is one sum in one order: it does not depend on the other rows or their count.
//
// Compiled and registered by few_rows.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#ifdef __FMA__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kLane = 8;                 // floats of a vector
constexpr int kLine = 16;                // floats of a line of the cache
constexpr int kOuts = 4;                 // rows of wt taken together
constexpr int kRows = 3;                 // rows of x taken together: 4 x 3 sums fit the registers
constexpr int64_t kSmallest = 16 << 10;  // numbers of wt that are worth another thread

typedef float Vector __attribute__((vector_size(kLane * sizeof(float))));

// `count` numbers, and zeros after them.
inline Vector Load(const float* from, int64_t count = kLane) {
  Vector v = {};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

// Rounded once, where the CPU can. Left to themselves compilers do so in some loops and not in
// others, and a row's numbers would depend on how many rows there are.
inline Vector MultiplyAdd(Vector a, Vector b, Vector c) {
#ifdef __FMA__
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline float Sum(const Vector& v) {
  typedef float Half __attribute__((vector_size(kLane / 2 * sizeof(float))));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half h = halves[0] + halves[1];
  return (h[0] + h[2]) + (h[1] + h[3]);
}

// `Outs` rows of wt times `Rows` of x. Meanwhile what comes next of wt is fetched, `stride` numbers
// of it for every vector: spread out, for memory that is asked for all at once is waited for.
template <int Outs, int Rows>
inline void Tile(const float* w, const float* x, float* y, int64_t in, int64_t out,
                 const float* next, int64_t stride) {
  Vector sums[Outs][Rows] = {};
  const auto add = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    Vector mine[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) mine[r] = Load(x + r * in + i, count);
#pragma GCC unroll 4
    for (int o = 0; o < Outs; o++) {
      const Vector weights = Load(w + o * in + i, count);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) sums[o][r] = MultiplyAdd(weights, mine[r], sums[o][r]);
    }
  };
  int64_t i = 0;
  for (; i + kLane <= in; i += kLane, next += stride) {
    __builtin_prefetch(next);
    __builtin_prefetch(next + kLine);
    add(i, kLane);
  }
  if (i < in) add(i, in - i);
#pragma GCC unroll 4
  for (int o = 0; o < Outs; o++) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) y[r * out + o] = Sum(sums[o][r]);
  }
}

template <int Outs>
void AllRows(const float* w, const float* x, float* y, int64_t in, int64_t out, int64_t rows) {
  const int64_t tiles = (rows + kRows - 1) / kRows, stride = (kLane * Outs + tiles - 1) / tiles;
  const float* next = w + Outs * in;
  for (int64_t left = rows, take; left; left -= take) {
    take = left == kRows + 1 ? 2 : std::min<int64_t>(left, kRows);  // not three and one
    if (take == 3) Tile<Outs, 3>(w, x, y, in, out, next, stride);
    if (take == 2) Tile<Outs, 2>(w, x, y, in, out, next, stride);
    if (take == 1) Tile<Outs, 1>(w, x, y, in, out, next, stride);
    x += take * in, y += take * out, next += in / kLane * stride;
  }
}

struct Product {
  const float *w, *x;
  float* y;
  int64_t in, out, rows, parts, width;  // of wt's rows, a part has `width`
  std::atomic<int64_t> next{0}, done{0};

  // Whoever comes takes parts until none is left, so nobody waits for a thread that never comes.
  void Help() {
    for (int64_t part; (part = next++) < parts; done++) {
      const int64_t end = std::min(out, (part + 1) * width);
      int64_t o = part * width;
      for (; o + kOuts <= end; o += kOuts) AllRows<kOuts>(w + o * in, x, y + o, in, out, rows);
      for (; o < end; o++) AllRows<1>(w + o * in, x, y + o, in, out, rows);
    }
  }
};

ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> wt,
                    ffi::ResultBuffer<ffi::F32> y) {
  auto product = std::make_shared<Product>();  // a late thread may look at it after we are gone
  product->x = x.typed_data();
  product->w = wt.typed_data();
  product->y = y->typed_data();
  product->rows = x.dimensions()[0];
  product->out = wt.dimensions()[0];
  product->in = wt.dimensions()[1];
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t parts =
      std::clamp<int64_t>(product->out * product->in / kSmallest, 1, 4 * threads);
  product->width = ((product->out + parts - 1) / parts + kOuts - 1) / kOuts * kOuts;
  product->parts = (product->out + product->width - 1) / product->width;
  const int64_t helpers = std::min(threads, product->parts) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule([product] { product->Help(); });
  product->Help();
  while (product->done < product->parts) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRows, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
