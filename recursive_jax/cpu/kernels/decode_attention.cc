// Writes new rows of a KVCache, then attends: one query per lane over the rows of its slot. float32.
//
// Every row is read once for all query heads of its kv head, without intermediate results. XLA runs
// a dozen small kernels per block of rows and gathers the blocks of all lanes first; its scatter
// writes a new key number by number. A lane's numbers do not depend on the other lanes, not even on
// NaN, nor on rows outside of its mask.
//
// Compiled and registered by build.py, called by cache.py.

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
using Ints = ffi::Buffer<ffi::S32>;

constexpr int64_t kRows = 32;            // the most of a block: KVCache.BLOCK
constexpr int64_t kSizes = 64;           // the most vectors of a head
constexpr int64_t kSmallest = 16 << 10;  // floats that are worth another thread

// One kv head of one lane, for `Heads` of its query heads.
template <int Heads>
struct Head {
  static constexpr int kWide = Heads <= 2 ? 4 : 2;  // what is summed up at once fits the registers

  const float* q;  // [Heads, size]
  int64_t size, rows;
  float scale, softcap;
  float most[Heads], total[Heads];
  Vector y[Heads][kSizes];
  alignas(Vector) float scores[Heads][kRows];

  Head(const float* q, int64_t size, int64_t rows, float scale, float softcap)
      : q(q), size(size), rows(rows), scale(scale), softcap(softcap) {
    for (int g = 0; g < Heads; g++) {
      most[g] = -std::numeric_limits<float>::infinity(), total[g] = 0;
      std::fill_n(y[g], size / kLane, Vector{});
    }
  }

  // Rows begin ... end - 1 of a block: keys [size, rows], values [rows, size]. Meanwhile the block
  // `next` floats further is fetched.
  void Add(const float* keys, const float* values, int64_t begin, int64_t end, int64_t next) {
    int64_t r = 0;
    for (constexpr int64_t kStep = kWide * kLane; r < end && r + kStep <= rows; r += kStep) {
      Score<kWide>(keys, r, kLane, next);
    }
    for (; r < end && r + kLane <= rows; r += kLane) Score<1>(keys, r, kLane, next);
    if (r < end) Score<1>(keys, r, rows - r, next);
    float kept[Heads];
    for (int g = 0; g < Heads; g++) kept[g] = Weigh(g, begin, end);
    const int64_t vectors = size / kLane;
    int64_t v = 0;
    for (; v + kWide <= vectors; v += kWide) Sum<kWide>(values, v, begin, end, kept, next);
    for (; v < vectors; v++) Sum<1>(values, v, begin, end, kept, next);
  }

  // Rows from r on, `Wide` vectors of them; of the last one `count` are there.
  template <int Wide>
  inline void Score(const float* keys, int64_t r, int64_t count, int64_t next) {
    Vector sums[Heads][Wide] = {};
    for (int64_t i = 0; i < size; i++) {
      const float* at = keys + i * rows + r;
      Fetch<Wide>(at + next);
#pragma GCC unroll 4
      for (int v = 0; v < Wide; v++) {
        const Vector key = count < kLane ? Load(at, count) : Load(at + v * kLane);
#pragma GCC unroll 4
        for (int g = 0; g < Heads; g++) {
          sums[g][v] = MultiplyAdd(Repeat(q[g * size + i]), key, sums[g][v]);
        }
      }
    }
    for (int g = 0; g < Heads; g++) {
      for (int v = 0; v < Wide; v++) Store(&scores[g][r + v * kLane], sums[g][v] * Repeat(scale));
    }
  }

  template <int Wide>
  static inline void Fetch(const float* at) {
#pragma GCC unroll 2
    for (int v = 0; v < Wide; v += 2) __builtin_prefetch(at + v * kLane);
  }

  // Scores become weights, relative to the largest so far; returns what earlier ones are worth now.
  float Weigh(int g, int64_t begin, int64_t end) {
    float* const s = scores[g];
    const int64_t padded = (end + kLane - 1) / kLane * kLane;
    if (softcap) {
      for (int64_t r = begin; r < end; r++) s[r] = std::tanh(s[r] / softcap) * softcap;
    }
    const float top = std::max(most[g], *std::max_element(s + begin, s + end));
    const float worth = Exp(most[g] - top);
    most[g] = top;
    float sum = 0;
    for (int64_t r = 0; r < padded; r += kLane) Store(s + r, Exp(Load(s + r) - Repeat(top)));
    for (int64_t r = begin; r < end; r++) sum += s[r];
    total[g] = total[g] * worth + sum;
    return worth;
  }

  template <int Wide>
  inline void Sum(const float* values, int64_t v, int64_t begin, int64_t end, const float* kept,
                  int64_t next) {
    Vector sums[Heads][Wide];
    for (int g = 0; g < Heads; g++) {
      for (int i = 0; i < Wide; i++) sums[g][i] = y[g][v + i] * Repeat(kept[g]);
    }
    for (int64_t r = begin; r < end; r++) {
      Fetch<Wide>(values + r * size + v * kLane + next);
#pragma GCC unroll 4
      for (int i = 0; i < Wide; i++) {
        const Vector value = Load(values + r * size + (v + i) * kLane);
#pragma GCC unroll 4
        for (int g = 0; g < Heads; g++) {
          sums[g][i] = MultiplyAdd(Repeat(scores[g][r]), value, sums[g][i]);
        }
      }
    }
    for (int g = 0; g < Heads; g++) std::copy_n(sums[g], Wide, y[g] + v);
  }

  void Write(float* to) const {
    for (int g = 0; g < Heads; g++) {
      const Vector share = Repeat(total[g] ? 1 / total[g] : 0);  // no rows: zeros
      for (int64_t i = 0; i < size; i += kLane) Store(to + g * size + i, y[g][i / kLane] * share);
    }
  }
};

struct Job {
  const float *q, *k, *v;
  const int32_t *loop, *slots, *positions, *windows;  // windows: nullptr, none is limited
  float *keys, *values, *y;
  int64_t lanes, added, layer, heads, kv_heads, size;  // added: new rows, those of the lanes first
  int64_t loops, layers, num_slots, blocks, rows;
  float scale, softcap;
  std::atomic<int64_t> next{0}, done{0};

  // Rows [begin, end) of a lane's slot that it may see; none if it is idle.
  int64_t Begin(int64_t lane) const {
    const int64_t window = windows ? windows[lane] : 0;
    return window > 0 ? std::max<int64_t>(0, positions[lane] - window + 1) : 0;
  }
  int64_t End(int64_t lane) const {
    return positions[lane] < blocks * rows ? positions[lane] + 1 : 0;
  }

  int64_t Parts() const { return added + lanes * kv_heads; }

  // Whoever comes takes parts until none is left, so nobody waits for a thread that never comes:
  // first new rows, and when all stand in the cache, heads.
  void Help() {
    for (int64_t part; (part = next++) < Parts(); done++) {
      if (part < added) {
        Write(part);
        continue;
      }
      while (done < added) std::this_thread::yield();
      const int64_t i = part - added, group = heads / kv_heads;
      for (int64_t g = 0; g < group;) {
        const int64_t left = group - g;
        g += left >= 4 ? Attend<4>(i, g) : left == 3 ? Attend<3>(i, g)
             : left == 2 ? Attend<2>(i, g) : Attend<1>(i, g);
      }
    }
  }

  // Where a block of a head begins, in keys and in values.
  int64_t Place(int64_t l, int64_t slot, int64_t block, int64_t head) const {
    const int64_t blocks_before = ((l * layers + layer) * num_slots + slot) * blocks + block;
    return (blocks_before * kv_heads + head) * rows * size;
  }

  // The r-th new row goes where its loop, slot and position say; nowhere, if that is not there.
  void Write(int64_t r) {
    const int64_t l = loop[r], slot = slots[r], position = positions[r];
    const auto within = [](int64_t i, int64_t end) { return 0 <= i && i < end; };
    if (!within(l, loops) || !within(slot, num_slots) || !within(position, blocks * rows)) return;
    const int64_t block = position / rows, row = position % rows;
    // A key lies in as many cache lines of the CPU as it has numbers: all are fetched, then written.
    for (int64_t head = 0; head < kv_heads; head++) {
      const int64_t to = Place(l, slot, block, head);
      for (int64_t i = 0; i < size; i++) __builtin_prefetch(keys + to + i * rows + row, 1);
      for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(values + to + row * size + i, 1);
    }
    for (int64_t head = 0; head < kv_heads; head++) {
      const int64_t from = (r * kv_heads + head) * size, to = Place(l, slot, block, head);
      for (int64_t i = 0; i < size; i++) keys[to + i * rows + row] = k[from + i];
      std::copy_n(v + from, size, values + to + row * size);
    }
  }

  // Query heads g, g + 1, … of the i-th kv head, counted lane by lane.
  template <int Heads>
  int64_t Attend(int64_t i, int64_t g) {
    const int64_t lane = i / kv_heads, head = i % kv_heads;
    const int64_t at = (lane * heads + head * (heads / kv_heads) + g) * size;
    Head<Heads> mine(q + at, size, rows, scale, softcap);
    const int64_t l = std::clamp<int64_t>(loop[lane], 0, loops - 1);  // as XLA would
    const int64_t slot = std::clamp<int64_t>(slots[lane], 0, num_slots - 1);
    const auto place = [&](int64_t block, int64_t head) { return Place(l, slot, block, head); };
    const int64_t begin = Begin(lane), end = End(lane), first = begin / rows;
    for (int64_t block = first; block * rows < end; block++) {
      const int64_t from = block * rows, here = place(block, head);
      const int64_t next = from + rows < end       ? place(block + 1, head)
                           : head + 1 < kv_heads ? place(first, head + 1)
                                                 : here;
      mine.Add(keys + here, values + here, std::max(begin, from) - from,
               std::min(end - from, rows), next - here);
    }
    mine.Write(y + at);
    return Heads;
  }
};

// q [B, heads, size]; k and v [N, kv heads, size] with N >= B, and where each of their rows goes:
// loop, slots, positions [N]. Query i is at the place of row i, and sees new rows too. layer [1]; windows
// [B], if there are any. keys [loop, layer, slot, block, kv head, size, row], values the same with
// row before size, are arguments and, written to, results. Argument and result are one buffer: XLA
// has copied the cache before if something else needs the old rows. Only the compiled text tells,
// and decoding/donation.py looks there.
ffi::Error Attend(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Floats, Floats, Ints layer,
                  Ints loop, Ints slots, Ints positions, ffi::RemainingArgs windows,
                  ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> keys,
                  ffi::ResultBuffer<ffi::F32> values, float scale, float softcap) {
  auto job = std::make_shared<Job>();  // a late thread may look at it after we are gone
  Job& j = *job;
  const auto cache = values->dimensions();
  j.q = q.typed_data(), j.k = k.typed_data(), j.v = v.typed_data();
  j.keys = keys->typed_data(), j.values = values->typed_data();
  j.loop = loop.typed_data(), j.slots = slots.typed_data(), j.positions = positions.typed_data();
  j.windows = windows.size() ? windows.get<Ints>(0)->typed_data() : nullptr;
  j.y = y->typed_data(), j.scale = scale, j.softcap = softcap;
  j.lanes = q.dimensions()[0], j.heads = q.dimensions()[1], j.size = q.dimensions()[2];
  j.added = k.dimensions()[0];
  j.loops = cache[0], j.layers = cache[1], j.num_slots = cache[2], j.blocks = cache[3];
  j.kv_heads = cache[4], j.rows = cache[5];
  if (j.rows > kRows || j.size > kSizes * kLane || j.size % kLane || j.heads % j.kv_heads) {
    return ffi::Error::InvalidArgument("decode_attention.cc has no room for such heads or blocks");
  }
  j.layer = std::clamp<int64_t>(layer.typed_data()[0], 0, j.layers - 1);
  int64_t floats = 0;
  for (int64_t lane = 0; lane < j.lanes; lane++) {
    floats += std::max<int64_t>(0, j.End(lane) - j.Begin(lane)) * j.kv_heads * j.size * 2;
  }
  const int64_t all = j.Parts(), threads = pool.num_threads();
  const int64_t useful = std::min({threads, all, floats / kSmallest});
  for (int64_t i = 1; i < useful; i++) {
    pool.Schedule([job] { job->Help(); });
  }
  j.Help();
  while (j.done < all) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeAttention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
