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

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kLane = 8;                 // floats of a vector
constexpr int kOuts = 4;                 // rows of wt taken together
constexpr int kRows = 3;                 // rows of x taken together: 4 x 3 sums fit the registers
constexpr int64_t kSmallest = 16 << 10;  // numbers of wt that are worth another thread

typedef float Vector __attribute__((vector_size(kLane * sizeof(float))));

inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// `Outs` rows of wt times `Rows` of x. While the first rows of x are multiplied, the rows of wt
// that come next are fetched.
template <int Outs, int Rows>
inline void Tile(const float* w, const float* x, float* y, int64_t in, int64_t out, bool fetch) {
  Vector sums[Outs][Rows] = {};
  int64_t i = 0;
  for (; i + kLane <= in; i += kLane) {
    if (fetch) {
#pragma GCC unroll 4
      for (int o = 0; o < Outs; o++) __builtin_prefetch(w + (o + Outs) * in + i);
    }
    Vector mine[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) mine[r] = Load(x + r * in + i);
#pragma GCC unroll 4
    for (int o = 0; o < Outs; o++) {
      const Vector weights = Load(w + o * in + i);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) sums[o][r] += weights * mine[r];
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < Outs; o++) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      float sum = 0;
      for (int lane = 0; lane < kLane; lane++) sum += sums[o][r][lane];
      for (int64_t j = i; j < in; j++) sum += w[o * in + j] * x[r * in + j];
      y[r * out + o] = sum;
    }
  }
}

template <int Outs>
void AllRows(const float* w, const float* x, float* y, int64_t in, int64_t out, int64_t rows) {
  int64_t r = 0;
  for (; rows - r >= kRows; r += kRows)
    Tile<Outs, kRows>(w, x + r * in, y + r * out, in, out, r == 0);
  if (rows - r == 2) Tile<Outs, 2>(w, x + r * in, y + r * out, in, out, r == 0);
  if (rows - r == 1) Tile<Outs, 1>(w, x + r * in, y + r * out, in, out, r == 0);
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
