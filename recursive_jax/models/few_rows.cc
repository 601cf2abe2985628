// y = x wt^T for a few rows x [rows, in] and large weights wt [out, in], and in the same pass what
// the LoRA of each row's own loop adds; all float32, row-major.
//
// Reading the weights is what takes the time, so they are read once, front to back, whatever the
// rows: kernels for large products first copy them into blocks, those for one row read them again
// for every row. Rows of zeros, as idle lanes have, cost nothing. Each number of y is one sum in one
// order, which depends on nothing but whether the rows are more than `kApart`.
//
// Compiled and registered by few_rows.py.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __FMA__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

constexpr int64_t kLane = 8;             // floats of a vector
constexpr int64_t kLine = 16;            // floats of a line of the cache
constexpr int64_t kPanel = 2 * kLane;    // rows side by side in a panel
constexpr int64_t kApart = 12;           // up to so many rows are apart
constexpr int64_t kSmallest = 16 << 10;  // weights that are worth another thread

typedef float Vector __attribute__((vector_size(kLane * sizeof(float))));

// `count` numbers, and zeros after them.
inline Vector Load(const float* from, int64_t count = kLane) {
  Vector v = {};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

inline Vector Repeat(float number) {
  Vector v;  // a sum with zeros would be one more operation
  for (int i = 0; i < kLane; i++) v[i] = number;
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

// Some rows of x, as their product takes them. Side by side, up to 16 rows make one vector or two
// of every number, which one weight multiplies. Apart, a row makes vectors of its own numbers, which
// as many weights multiply: for so few rows loading single weights would take longer than memory.
struct Panel {
  bool apart;
  std::vector<int64_t> rows;           // in x and y
  std::vector<int32_t> loops;          // of the rows; those of a loop stand together
  std::vector<int64_t> first, last;    // vectors that have rows of a loop (rows, where apart)
  int64_t vectors;                     // of all rows (as many as rows, where apart)
  std::unique_ptr<Vector[]> x, hidden;  // the rows, and their products with A

  // Floats from one of `length` numbers to the next, or from one row to the next.
  int64_t Step(int64_t length) const {
    return apart ? (length + kLane - 1) / kLane * kLane : vectors * kLane;
  }
  // Where number i of vector v is, or number i of row v.
  float* At(const std::unique_ptr<Vector[]>& numbers, int64_t length, int64_t v, int64_t i) const {
    float* all = reinterpret_cast<float*>(numbers.get());
    return all + (apart ? v * Step(length) + i : i * Step(length) + v * kLane);
  }
  std::unique_ptr<Vector[]> Space(int64_t length) const {  // aligned: much faster to read
    const int64_t floats = apart ? vectors * Step(length) : length * Step(length);
    return std::unique_ptr<Vector[]>(new Vector[floats / kLane]);
  }
};

// What reads the same x: a projection's rows of wt and, by loop, of A, and its B.
struct Member {
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

template <int Outs, int Wide>
inline void Copy(Vector (*to)[Wide], const Vector (*from)[Wide]) {
#pragma GCC unroll 8
  for (int o = 0; o < Outs; o++) {
#pragma GCC unroll 4
    for (int v = 0; v < Wide; v++) to[o][v] = from[o][v];
  }
}

// sums += `Outs` rows of w, `stride` apart, times `Wide` vectors of x, `step` apart. Meanwhile what
// comes next is fetched, spread out, for memory that is asked for all at once is waited for: where
// rows are apart, `pace` floats of it for every vector.
template <bool Apart, int Outs, int Wide>
inline void Add(Vector (*kept)[Wide], const float* w, int64_t stride, const float* x, int64_t step,
                int64_t count, const float* next, int64_t pace) {
  Vector sums[Outs][Wide];
  Copy<Outs, Wide>(sums, kept);
  const auto add = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    Vector mine[Wide];
#pragma GCC unroll 4
    for (int v = 0; v < Wide; v++) {
      mine[v] = Apart ? Load(x + v * step + i, n) : Load(x + i * step + v * kLane);
    }
#pragma GCC unroll 8
    for (int o = 0; o < Outs; o++) {
      const float* from = w + o * stride + i;
      const Vector weights = Apart ? Load(from, n) : Repeat(*from);
#pragma GCC unroll 4
      for (int v = 0; v < Wide; v++) sums[o][v] = MultiplyAdd(weights, mine[v], sums[o][v]);
    }
  };
  int64_t i = 0;
  if constexpr (Apart) {
    for (; i + kLane <= count; i += kLane, next += pace) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + kLine);
      add(i, kLane);
    }
    if (i < count) add(i, count - i);
  } else {
    for (; i + kLine <= count; i += kLine) {
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLine; k++) {
        if (k < Outs) __builtin_prefetch(next + i * Outs + k * kLine);
        add(i + k, 1);
      }
    }
    for (; i < count; i++) add(i, 1);
  }
  Copy<Outs, Wide>(kept, sums);
}

struct Product {
  const float *w, *a = nullptr;
  float* y;
  int64_t in, out, loops, ranks = 0;  // ranks: rows of A
  std::vector<Panel> panels;
  std::vector<Member> members;
  std::vector<Part> parts;
  int64_t hidden;  // so many of the parts, the first ones, are of A
  std::atomic<int64_t> next{0}, done{0};

  // Whoever comes takes parts until none is left, so nobody waits for a thread that never comes.
  void Help() {
    for (int64_t i; (i = next++) < static_cast<int64_t>(parts.size()); done++) {
      while (i >= hidden && done < hidden) std::this_thread::yield();
      for (int64_t o = parts[i].begin, end = parts[i].end; o < end;) {
        const int64_t left = end - o;
        if (left >= 6 && !panels[0].apart) {
          o += AllRows<6>(parts[i], o);
        } else if (left >= 4) {
          o += AllRows<4>(parts[i], o);
        } else if (left >= 2) {
          o += AllRows<2>(parts[i], o);
        } else {
          o += AllRows<1>(parts[i], o);
        }
      }
    }
  }

  template <int Outs>
  int64_t AllRows(const Part& part, int64_t o) {
    for (Panel& panel : panels) {
      if (panel.rows[0] >= part.member->rows) continue;
      int64_t v = part.loop < 0 ? 0 : panel.first[part.loop];
      const int64_t end = part.loop < 0 ? panel.vectors : panel.last[part.loop];
      const int64_t pace = Outs * kLane / std::max<int64_t>((end - v + 2) / 3, 1);
      const float* next = (part.loop < 0 ? w : a) + (o + Outs) * in;
      for (int64_t take; v < end; v += take, next += in / kLane * pace) {
        // Four times three sums and what they are made of fit the registers, or six times two.
        take = std::min<int64_t>(end - v, panel.apart && end - v != 4 ? 3 : 2);
        if constexpr (Outs <= 4) {
          if (panel.apart && take == 3) Tile<true, Outs, 3>(part, o, panel, v, next, pace);
          if (panel.apart && take == 2) Tile<true, Outs, 2>(part, o, panel, v, next, pace);
          if (panel.apart && take == 1) Tile<true, Outs, 1>(part, o, panel, v, next, pace);
        }
        if (!panel.apart && take == 2) Tile<false, Outs, 2>(part, o, panel, v, next, pace);
        if (!panel.apart && take == 1) Tile<false, Outs, 1>(part, o, panel, v, next, pace);
      }
    }
    return Outs;
  }

  // Rows o, o + 1, … of what the part is of, times `Wide` vectors of the panel.
  template <bool Apart, int Outs, int Wide>
  void Tile(const Part& part, int64_t o, Panel& panel, int64_t v, const float* next, int64_t pace) {
    constexpr int64_t kRows = Apart ? 1 : kLane;  // of a vector
    const Member& member = *part.member;
    const bool hidden = part.loop >= 0;
    const float* mine = (hidden ? a : w) + o * in;
    Vector sums[Outs][Wide] = {};
    const float* x = panel.At(panel.x, in, v, 0);
    Add<Apart, Outs, Wide>(sums, mine, in, x, panel.Step(in), in, next, pace);
    if (!hidden && member.rank) AddLora<Apart, Outs, Wide>(sums, member, o, panel, v);
    float numbers[Outs][Wide * kRows];
    if constexpr (Apart) {
      for (int j = 0; j < Outs; j++) {
        for (int i = 0; i < Wide; i++) numbers[j][i] = Sum(sums[j][i]);
      }
    } else {
      std::memcpy(numbers, sums, sizeof sums);
    }
    for (int64_t i = 0, r = v * kRows; i < Wide * kRows; i++, r++) {
      const bool there = r < static_cast<int64_t>(panel.rows.size());
      if (hidden) {  // zeros but for the rows of this loop
        const bool own = there && panel.loops[r] == part.loop;
        for (int j = 0; j < Outs; j++) {
          panel.At(panel.hidden, ranks, v + i / kRows, o + j)[i % kRows] = own ? numbers[j][i] : 0;
        }
      } else if (there && panel.rows[r] < member.rows) {
        float* to = y + panel.rows[r] * out + o;
#pragma GCC unroll 8
        for (int j = 0; j < Outs; j++) to[j] = numbers[j][i];
      }
    }
  }

  template <bool Apart, int Outs, int Wide>
  void AddLora(Vector (&sums)[Outs][Wide], const Member& member, int64_t o, Panel& panel,
               int64_t v) {
    const int64_t stride = loops * member.rank;
    const float* b = member.b + (o - member.begin) * stride;
    const float* next = b + Outs * stride;
    for (int64_t l = 0; l < loops; l++, b += member.rank) {
      const int64_t first = std::max(panel.first[l], v), last = std::min(panel.last[l], v + Wide);
      const auto add = [&](auto& some, auto wide, int64_t from) {
        const float* x = panel.At(panel.hidden, ranks, from, member.ranks + l * member.rank);
        Add<Apart, Outs, wide>(some, b, stride, x, panel.Step(ranks), member.rank, next, 0);
      };
      if (last - first == Wide) {
        add(sums, std::integral_constant<int, Wide>(), v);
        continue;
      }
      for (int64_t from = first; from < last; from++) {
        Vector some[Outs][1];
        for (int j = 0; j < Outs; j++) some[j][0] = sums[j][from - v];
        add(some, std::integral_constant<int, 1>(), from);
        for (int j = 0; j < Outs; j++) sums[j][from - v] = some[j][0];
      }
    }
  }
};

// The rows of `from`, as the panel has them.
void Fill(Panel& panel, const float* from, int64_t in) {
  static const float zero = 0;
  panel.x = panel.Space(in);
  const int64_t rows = panel.rows.size();
  if (panel.apart) {
    for (int64_t r = 0; r < rows; r++) {
      std::copy_n(from + panel.rows[r] * in, in, panel.At(panel.x, in, r, 0));
    }
    return;
  }
  for (int64_t v = 0; v < panel.vectors; v++) {
    const float* row[kLane];
    int64_t step[kLane];
    for (int64_t r = 0; r < kLane; r++) {
      const bool there = v * kLane + r < rows;
      row[r] = there ? from + panel.rows[v * kLane + r] * in : &zero;
      step[r] = there;
    }
    for (int64_t i = 0; i < in; i++) {
      float* to = panel.At(panel.x, in, v, i);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kLane; r++) to[r] = row[r][i * step[r]];
    }
  }
}

// Rows of x that have numbers, in panels; those of zeros are zeros in y.
std::vector<Panel> Panels(const float* x, const int32_t* loop, float* y, int64_t count, int64_t in,
                          int64_t out, int64_t loops, int64_t ranks, int64_t fewest) {
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
  const auto key = [&](int64_t r) { return std::pair(r >= fewest, loop ? loop[r] : 0); };
  std::stable_sort(order.begin(), order.end(), [&](auto r, auto s) { return key(r) < key(s); });
  std::vector<Panel> panels;
  const bool apart = count <= kApart;
  for (auto at = order.begin(); at != order.end();) {
    const auto end = at + std::min<int64_t>(apart ? kApart : kPanel, order.end() - at);
    Panel panel;
    panel.apart = apart;
    panel.rows.assign(at, end);
    panel.vectors = apart ? end - at : (end - at + kLane - 1) / kLane;
    panel.first.assign(loops, 0), panel.last.assign(loops, 0);
    for (int64_t r = 0; loops && r < end - at; r++) {
      const int32_t l = std::clamp<int64_t>(loop[at[r]], 0, loops - 1);  // as XLA would
      const int64_t v = apart ? r : r / kLane;
      panel.loops.push_back(l);
      if (!panel.last[l]) panel.first[l] = v;
      panel.last[l] = v + 1;
    }
    Fill(panel, x, in);
    panel.hidden = panel.Space(ranks);
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
    member.begin = member.end, member.ranks += loops * member.rank;
    member.end += outs[i], member.rows = rows[i];
    if (loops) {
      const auto b = lora.get<Floats>(2 + i);
      member.b = b->typed_data(), member.rank = b->dimensions()[1] / loops;
    }
    p.members.push_back(member);
  }
  const int64_t fewest = *std::min_element(rows.begin(), rows.end());
  p.panels = Panels(x.typed_data(), loop, p.y, x.dimensions()[0], p.in, p.out, loops, p.ranks,
                    fewest);
  if (p.panels.empty()) return ffi::Error::Success();

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
    pool.Schedule([product] { product->Help(); });
  }
  p.Help();
  while (p.done < parts) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewRows, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Attr<ffi::Span<const int64_t>>("outs")
                                  .Attr<ffi::Span<const int64_t>>("rows")
                                  .Attr<int64_t>("loops"));
