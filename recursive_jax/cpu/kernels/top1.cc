// The largest number of every row of logits [N, V], its first index, and log(sum(e^x)); float32.
//
// XLA makes three passes in one thread, half a millisecond each for 14 rows of 49,152. A row's
// results do not depend on the other rows.
//
// Compiled and registered by build.py, called by top1.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

constexpr int64_t kAtOnce = 4;           // vectors: one would wait for the one before
constexpr int64_t kSmallest = 16 << 10;  // floats that are worth another thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls add(i, vector) for the vectors of a row in turns of `kAtOnce`; what is beyond is `padding`.
template <typename AddTo>
inline void Each(const float* row, int64_t count, float padding, AddTo add) {
  int64_t at = 0;
  for (; at + kAtOnce * kLane <= count; at += kAtOnce * kLane) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kAtOnce; i++) add(i, Load(row + at + i * kLane));
  }
  for (; at < count; at += kLane) {
    float rest[kLane];
    std::fill_n(rest, kLane, padding);
    std::copy_n(row + at, std::min(kLane, count - at), rest);
    add(0, Load(rest));
  }
}

struct Job {
  const float* x;
  float *top, *log_sum;
  int32_t* first;
  int64_t rows, count;
  std::atomic<int64_t> next{0}, done{0};

  // Whoever comes takes rows until none is left, so nobody waits for a thread that never comes.
  void Help() {
    for (int64_t r; (r = next++) < rows; done++) Row(r);
  }

  void Row(int64_t r) {
    const float* const row = x + r * count;
    Vector most[kAtOnce], sums[kAtOnce] = {};
    Integers broken[kAtOnce] = {};
    std::fill_n(most, kAtOnce, Repeat(-kInfinity));
    Each(row, count, -kInfinity, [&](int64_t i, Vector v) {
      most[i] = v > most[i] ? v : most[i];
      broken[i] |= v != v;
    });
    bool nan = false;
    float largest = -kInfinity;
    for (int64_t i = 0; i < kAtOnce; i++) {
      for (int64_t k = 0; k < kLane; k++) {
        nan |= broken[i][k] != 0, largest = std::max(largest, most[i][k]);
      }
    }
    top[r] = nan ? std::numeric_limits<float>::quiet_NaN() : largest;
    first[r] = nan ? count - 1 : std::find(row, row + count, largest) - row;
    log_sum[r] = top[r];
    if (!std::isfinite(top[r])) return;
    Each(row, count, -kInfinity, [&](int64_t i, Vector v) { sums[i] += Exp(v - Repeat(largest)); });
    double sum = 0;
    for (int64_t i = 0; i < kAtOnce; i++) {
      for (int64_t k = 0; k < kLane; k++) sum += sums[i][k];
    }
    log_sum[r] += std::log(sum);
  }
};

// x [N, V]; top, first, log_sum [N]. NaN for a row with NaN, whose `first` is the last id.
ffi::Error Find(ffi::ThreadPool pool, Floats x, ffi::ResultBuffer<ffi::F32> top,
                ffi::ResultBuffer<ffi::S32> first, ffi::ResultBuffer<ffi::F32> log_sum) {
  auto job = std::make_shared<Job>();  // a late thread may look at it after we are gone
  Job& j = *job;
  j.x = x.typed_data(), j.rows = x.dimensions()[0], j.count = x.dimensions()[1];
  j.top = top->typed_data(), j.first = first->typed_data(), j.log_sum = log_sum->typed_data();
  const int64_t useful = std::min({pool.num_threads(), j.rows, j.rows * j.count / kSmallest});
  for (int64_t i = 1; i < useful; i++) {
    pool.Schedule([job] { job->Help(); });
  }
  j.Help();
  while (j.done < j.rows) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Top1, Find,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<Floats>());
