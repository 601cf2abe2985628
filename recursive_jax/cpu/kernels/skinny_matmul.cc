// y = x wt^T for a few rows x [rows, in] and large weights wt [out, in]. The LoRA of each row's own
// loop is added in the same pass. All arrays are float32 and row-major.
//
// The product is bound by reading the weights, so they are read once for all rows and prefetched.
// Kernels for large products first copy the weights into blocks; kernels for one row read them again
// for every row. Zero rows, as of idle lanes, are skipped. Each number of y is one sum in a fixed
// order: a row's numbers do not depend on the other rows, nor on their count.
//
// Compiled and registered by build.py, called by matmul.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

constexpr int64_t kTile = 6;             // rows of wt that are multiplied at once
constexpr int64_t kSmallest = 16 << 10;  // weights that are worth another thread

// Vectors that one weight multiplies: two are enough to be as fast as the CPU can, but where it has
// longer ones, four are multiplied in the time of two.
#ifdef __AVX512F__
constexpr int kWidest = 4;
#else
constexpr int kWidest = 2;
#endif
constexpr int64_t kPanel = kWidest * kLane;  // rows of a panel

// Vectors of rows side by side, [pair][number][2], or one of each [number]: who reads one pair finds
// its numbers side by side too, from where a line begins. Both are much faster.
class Columns {
 public:
  Columns() = default;
  Columns(int64_t numbers, int64_t vectors)
      : numbers_(numbers),
        step_(std::min<int64_t>(vectors, 2)),
        lines_(new Line[(numbers * vectors + 1) / 2]) {}

  int64_t step() const { return step_; }          // from a number to the next
  int64_t apart() const { return numbers_ * 2; }  // from a pair to the next
  Vector* At(int64_t number, int64_t vector) const {
    return lines_[0].vectors + vector / 2 * apart() + number * step_ + vector % 2;
  }

 private:
  struct alignas(64) Line {
    Vector vectors[2];
  };
  int64_t numbers_, step_;
  std::unique_ptr<Line[]> lines_;
};

// Some rows of x, side by side: of every number they make one vector, two or kWidest.
struct Panel {
  std::vector<int64_t> rows;         // in x and y
  std::vector<int32_t> loops;        // of the rows; those of a loop stand together
  int64_t vectors;                   // of a number
  std::vector<int64_t> asked;        // of the vectors, by member: the first ones
  std::vector<int64_t> first, last;  // of the vectors, that have rows of a loop
  Columns x, hidden;                 // the rows, and their products with A
};

// What reads the same x: a projection's rows of wt and, by loop, of A, and its B.
struct Member {
  int64_t index;
  int64_t begin, end;   // rows of wt
  int64_t rows;         // of x that it is asked for, the first ones
  int64_t rank, ranks;  // of a loop; the first of its rows of A
  const float* b;       // [end - begin, loops * rank]
};

struct Part {
  const Member* member;
  int64_t loop;  // of A; -1: of wt
  int64_t begin, end;
};

template <int Outs, int Wide, class V>
inline void Copy(V (*to)[Wide], const V (*from)[Wide]) {
#pragma GCC unroll 6
  for (int o = 0; o < Outs; o++) {
#pragma GCC unroll 2
    for (int v = 0; v < Wide; v++) to[o][v] = from[o][v];
  }
}

// sums += `Outs` rows of w, `stride` apart, times `Wide` vectors of each of `count` numbers; those
// are `apart` from each other, and a number's are `step` before the next one's. Meanwhile as many
// rows from `next` on are fetched, a line at a time, for memory that is asked for all at once is
// waited for; and into the second level of the cache, for the first has no room for them beside x.
// For few vectors it has, and for what is needed in a moment: they are done with a line before the
// next comes from the second level.
template <int Outs, int Wide, class V>
inline void Add(V (*kept)[Wide], const float* w, int64_t stride, const V* x, int64_t step,
                int64_t apart, int64_t count, const float* next) {
  V sums[Outs][Wide];
  Copy<Outs, Wide>(sums, kept);
  // Where rows adjoin, from both halves of them in turn: two streams, which a CPU's own prefetcher
  // goes on with; of one stream, or of as many as there are rows, less comes in time.
  const bool halves = Outs % 2 == 0 && stride == count;
  const int64_t half = Outs / 2 * count;
  const auto ahead = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    return next + (halves ? n % 2 * half + i * (Outs / 2) + n / 2 * kLine : n * stride + i);
  };
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int o = 0; o < Outs; o++) {
      const V weights = Repeat<V>(w[o * stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < Wide; v++) {
        sums[o][v] = MultiplyAdd(weights, x[i * step + v * apart], sums[o][v]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kLine <= count; i += kLine) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLine; k++) {
      if (k < 2 * Outs && k % 2 == 0) __builtin_prefetch(ahead(i, k / 2), 0, 2);
      if (k < 2 * Outs && k % 2 && Wide == 1) __builtin_prefetch(w + k / 2 * stride + i + 2 * kLine);
      add(i + k);
    }
  }
  for (; i < count; i++) add(i);
  Copy<Outs, Wide>(kept, sums);
}

#ifdef __AVX512F__
// Two pairs as two long vectors.
template <int Outs>
inline void Add(Vector (*kept)[4], const float* w, int64_t stride, const Vector* x, int64_t step,
                int64_t apart, int64_t count, const float* next) {
  LongVector sums[Outs][2];
  std::memcpy(sums, kept, sizeof sums);
  const auto pairs = reinterpret_cast<const LongVector*>(x);
  Add<Outs, 2>(sums, w, stride, pairs, step / 2, apart / 2, count, next);
  std::memcpy(kept, sums, sizeof sums);
}
#endif

// The same with x from a number and its v-th vector on.
template <int Outs, int Wide>
inline void Add(Vector (*sums)[Wide], const float* w, int64_t stride, const Columns& x,
                int64_t number, int64_t v, int64_t count, const float* next) {
  const int64_t apart = Wide == 4 ? x.apart() : 1;
  Add<Outs>(sums, w, stride, x.At(number, v), x.step(), apart, count, next);
}

// Where a tile's weights begin, and those of its LoRA if it has one.
struct Place {
  const float *w, *b;
};

struct Product {
  const float *w, *a = nullptr;
  float* y;
  int64_t in, out, loops, ranks = 0;  // ranks: rows of A
  std::vector<Panel> panels;
  std::vector<Member> members;
  std::vector<Part> parts;
  int64_t hidden;  // so many of the parts, the first ones, are of A
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> ready{false};  // the panels are there

  // The first part of a thread, whose weights come while the panels are made.
  int64_t Take() {
    const int64_t i = next++;
    if (i < static_cast<int64_t>(parts.size()) && !ready) {
      const Part& part = parts[i];
      const float *from = At(part, part.begin).w, *end = At(part, part.end).w;
      end = std::min(end, from + kTile * in);
      for (; from < end; from += kLine) __builtin_prefetch(from, 0, 2);
    }
    return i;
  }

  // Whoever comes takes parts until none is left, so nobody waits for a thread that never comes.
  void Help(int64_t i) {
    const int64_t count = parts.size();
    while (!ready) std::this_thread::yield();
    if (panels.empty()) return;
    for (int64_t then; i < count; i = then, done++) {
      while (i >= hidden && done < hidden) std::this_thread::yield();
      const Part &part = parts[i], *after = &part;
      for (int64_t o = part.begin, width; o < part.end; o += width) {
        const int64_t left = part.end - o;
        width = left >= kTile ? kTile : left >= 2 ? 2 : 1;
        if (width == left && (then = next++) < count) after = &parts[then];  // fetched meanwhile
        const Place to_come = after == &part ? At(part, o + width) : At(*after, after->begin);
        width == kTile ? AllRows<kTile>(part, o, to_come)
        : width == 2 ? AllRows<2>(part, o, to_come) : AllRows<1>(part, o, to_come);
      }
    }
  }

  Place At(const Part& part, int64_t o) const {
    if (part.loop >= 0) return {a + o * in, nullptr};
    const Member& member = *part.member;
    return {w + o * in, member.rank ? member.b + (o - member.begin) * loops * member.rank : nullptr};
  }

  template <int Outs>
  void AllRows(const Part& part, int64_t o, const Place& then) {
    for (Panel& panel : panels) {
      int64_t v = part.loop < 0 ? 0 : panel.first[part.loop], end = panel.asked[part.member->index];
      if (part.loop >= 0) end = std::min(end, panel.last[part.loop]);
      // kTile times two sums, and what they are made of, fit the registers.
      if constexpr (kWidest == 4) {  // of both pairs: all take the time of one
        if (v < 2 && end > 2) {
          Tile<Outs, 4>(part, o, panel, 0, then);
          continue;
        }
      }
      if (end - v == 2) Tile<Outs, 2>(part, o, panel, v, then);
      if (end - v == 1) Tile<Outs, 1>(part, o, panel, v, then);
    }
  }

  // Rows o, o + 1, … of what the part is of, times `Wide` vectors of the panel; `then` is fetched.
  template <int Outs, int Wide>
  void Tile(const Part& part, int64_t o, Panel& panel, int64_t v, const Place& then) {
    const Member& member = *part.member;
    const bool hidden = part.loop >= 0;
    const Place mine = At(part, o);
    Vector sums[Outs][Wide] = {};
    Add<Outs>(sums, mine.w, in, panel.x, 0, v, in, then.w);
    if (mine.b) AddLora<Outs, Wide>(sums, member, mine.b, panel, v, then.b ? then.b : mine.b);
    float numbers[Outs][Wide * kLane];
    std::memcpy(numbers, sums, sizeof sums);
    for (int64_t i = 0, r = v * kLane; i < Wide * kLane; i++, r++) {
      const bool there = r < static_cast<int64_t>(panel.rows.size());
      if (hidden) {  // zeros but for the rows of this loop
        const bool own = there && panel.loops[r] == part.loop;
        for (int j = 0; j < Outs; j++) {
          (*panel.hidden.At(o + j, r / kLane))[r % kLane] = own ? numbers[j][i] : 0;
        }
      } else if (there && panel.rows[r] < member.rows) {
        float* to = y + panel.rows[r] * out + o;
#pragma GCC unroll 6
        for (int j = 0; j < Outs; j++) to[j] = numbers[j][i];
      }
    }
  }

  template <int Outs, int Wide>
  void AddLora(Vector (&sums)[Outs][Wide], const Member& member, const float* b, Panel& panel,
               int64_t v, const float* next) {
    const int64_t stride = loops * member.rank;
    for (int64_t l = 0, at = member.ranks; l < loops;
         l++, b += member.rank, next += member.rank, at += member.rank) {
      const int64_t first = std::max(panel.first[l], v), last = std::min(panel.last[l], v + Wide);
      const auto part = [&](auto wide) {
        Vector some[Outs][wide];
        for (int j = 0; j < Outs; j++) std::copy_n(sums[j] + first - v, wide(), some[j]);
        Add<Outs>(some, b, stride, panel.hidden, at, first, member.rank, next);
        for (int j = 0; j < Outs; j++) std::copy_n(some[j], wide(), sums[j] + first - v);
      };
      if (last - first == Wide || (first < 2 && last > 2)) {  // as their product with A was made
        Add<Outs>(sums, b, stride, panel.hidden, at, v, member.rank, next);
      } else if (last - first == 2) {
        if constexpr (Wide == 4) part(std::integral_constant<int, 2>());
      } else if (last > first) {
        part(std::integral_constant<int, 1>());
      }
    }
  }
};

// The rows of the panel in x [rows, in], side by side.
Columns SideBySide(const Panel& panel, const float* x, int64_t in) {
  static const float zero = 0;
  Columns columns(in, panel.vectors);
  const int64_t rows = panel.rows.size();
  for (int64_t v = 0; v < panel.vectors; v++) {
    const float* row[kLane];
    int64_t step[kLane];
    for (int64_t r = 0; r < kLane; r++) {
      const bool there = v * kLane + r < rows;
      row[r] = there ? x + panel.rows[v * kLane + r] * in : &zero;
      step[r] = there;
    }
    int64_t i = 0;
    for (Vector block[kLane]; i + kLane <= in; i += kLane) {
#pragma GCC unroll 8
      for (int64_t r = 0; r < kLane; r++) block[r] = step[r] ? Load(row[r] + i) : Vector{};
      Transpose(block);
#pragma GCC unroll 8
      for (int64_t k = 0; k < kLane; k++) *columns.At(i + k, v) = block[k];
    }
    for (; i < in; i++) {
      for (int64_t r = 0; r < kLane; r++) (*columns.At(i, v))[r] = row[r][i * step[r]];
    }
  }
  return columns;
}

// Rows of x that have numbers, in panels; those of zeros are zeros in y.
std::vector<Panel> Panels(const float* x, const int32_t* loop, float* y, int64_t count, int64_t in,
                          int64_t out, int64_t loops, int64_t ranks,
                          ffi::Span<const int64_t> asked) {
  std::vector<int64_t> order;
  for (int64_t r = 0; r < count; r++) {
    const float* row = x + r * in;
    if (std::all_of(row, row + in, [](float number) { return number == 0; })) {
      std::fill_n(y + r * out, out, 0.f);
    } else {
      order.push_back(r);
    }
  }
  // Rows that all are asked for stay in front.
  const int64_t fewest = *std::min_element(asked.begin(), asked.end());
  const auto key = [&](int64_t r) { return std::pair(r >= fewest, loop ? loop[r] : 0); };
  std::stable_sort(order.begin(), order.end(), [&](auto r, auto s) { return key(r) < key(s); });
  std::vector<Panel> panels;
  for (auto at = order.begin(); at != order.end();) {
    const auto end = at + std::min<int64_t>(kPanel, order.end() - at);
    Panel panel;
    panel.rows.assign(at, end);
    const auto vectors = [](int64_t rows) {
      const int64_t least = (rows + kLane - 1) / kLane;
      return least > 2 ? kWidest : least;
    };
    panel.vectors = vectors(end - at);
    for (int64_t rows : asked) {
      int64_t count = end - at;
      while (count && at[count - 1] >= rows) count--;
      panel.asked.push_back(vectors(count));
    }
    panel.first.assign(loops, 0), panel.last.assign(loops, 0);
    for (int64_t r = 0; loops && r < end - at; r++) {
      const int32_t l = std::clamp<int64_t>(loop[at[r]], 0, loops - 1);  // as XLA would
      panel.loops.push_back(l);
      if (!panel.last[l]) panel.first[l] = r / kLane;
      panel.last[l] = r / kLane + 1;
    }
    panel.x = SideBySide(panel, x, in);
    panel.hidden = Columns(ranks, panel.vectors);
    panels.push_back(std::move(panel));
    at = end;
  }
  return panels;
}

// x [N, in], wt [out, in]; with LoRA also loop [N], A [all ranks, in] and, for every member, B
// [outs, loops * rank], whose columns stand loop by loop, as the rows of its part of A do. `outs`:
// rows of wt of each member; `rows`: of x that each is asked for, at least one of them all.
ffi::Error Multiply(ffi::ThreadPool pool, Floats x, Floats wt, ffi::RemainingArgs lora,
                    ffi::ResultBuffer<ffi::F32> y, ffi::Span<const int64_t> outs,
                    ffi::Span<const int64_t> rows, int64_t loops) {
  auto product = std::make_shared<Product>();  // a late thread may look at it after we are gone
  Product& p = *product;
  p.w = wt.typed_data(), p.y = y->typed_data();
  p.in = wt.dimensions()[1], p.out = wt.dimensions()[0], p.loops = loops;
  const int32_t* loop = nullptr;
  if (loops) {
    const auto a = lora.get<Floats>(1);
    loop = lora.get<ffi::Buffer<ffi::S32>>(0)->typed_data();
    p.a = a->typed_data(), p.ranks = a->dimensions()[0];
  }
  Member member = {};
  for (size_t i = 0; i < outs.size(); i++) {
    member.index = i, member.begin = member.end, member.ranks += loops * member.rank;
    member.end += outs[i], member.rows = rows[i];
    if (loops) {
      const auto b = lora.get<Floats>(2 + i);
      member.b = b->typed_data(), member.rank = b->dimensions()[1] / loops;
    }
    p.members.push_back(member);
  }

  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const auto split = [&](const Member& of, int64_t l, int64_t begin, int64_t end) {
    for (int64_t width; begin < end; begin += width) {  // smaller and smaller: all end together
      width = std::max((end - begin) / (2 * threads), kSmallest / p.in) / 12 * 12 + 12;
      p.parts.push_back({&of, l, begin, std::min(end, begin + width)});
    }
  };
  for (const Member& of : p.members) {
    for (int64_t l = 0, at = of.ranks; l < loops; l++, at += of.rank) {
      split(of, l, at, at + of.rank);
    }
  }
  p.hidden = p.parts.size();
  for (const Member& of : p.members) split(of, -1, of.begin, of.end);
  const int64_t parts = p.parts.size();
  for (int64_t i = 1; i < std::min(threads, parts); i++) {
    pool.Schedule([product, us = std::this_thread::get_id()] {
      if (std::this_thread::get_id() == us && !product->ready) return;  // a full pool calls at once
      product->Help(product->Take());
    });
  }
  const int64_t first = p.Take();
  p.panels = Panels(x.typed_data(), loop, p.y, x.dimensions()[0], p.in, p.out, loops, p.ranks,
                    rows);
  p.ready = true;
  if (p.panels.empty()) return ffi::Error::Success();
  p.Help(first);
  while (p.done < parts) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SkinnyMatmul, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Attr<ffi::Span<const int64_t>>("outs")
                                  .Attr<ffi::Span<const int64_t>>("rows")
                                  .Attr<int64_t>("loops"));
