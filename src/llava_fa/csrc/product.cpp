// C = A B, C + A B or C - A B in float32, by bf16 matrix instructions (AMX); a tenth as exact as float32.
//
// A number x is the sum of two of bf16, hi = bf16(x) and lo = bf16(x - hi), but for 2^-16 of it; of the four products that a
// product then is, lo lo is left out, which is as small. Where all lo of a matrix are zero, as where it was bf16, so are theirs;
// a rough product has hi hi alone.
//
// Both matrices are packed into tiles, a part of their length at a time: panels of 16 rows of A, or columns of B, "lines" here.
// Every sum is one thread's, in the order of k: it does not depend on their number.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "kernels.h"
#include "threads.h"
#include "tiles.h"

#if defined(__x86_64__) && (defined(LLAVA_FA_AMX) || defined(LLAVA_FA_EMULATE_AMX))
#define LLAVA_FA_ISA "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#include "simd_avx512.h"

namespace llava_fa {
namespace {
using namespace avx512;

constexpr int64_t LINES = 16, STEP = 32;  // of a tile: lines, and numbers of each
constexpr int64_t PLANE = 512;            // numbers of a tile
// Numbers of k, and rows of A, that are packed at a time; columns of B that a thread packs for itself, few enough to stay in its
// second-level cache while all rows pass by; panels that are packed beside each other.
constexpr int64_t LENGTH = 1024, ROWS = 4096, COLUMNS = 128, PANELS = 8;

#ifdef LLAVA_FA_EMULATE_AMX
thread_local float sums[4][16][16];
thread_local uint16_t operands[4][PLANE];
INLINE void use_tiles() {}
INLINE void leave_tiles() {}
template <int T>
INLINE void clear() { std::memset(sums[T], 0, sizeof sums[T]); }
template <int T>
INLINE void load_tile(const uint16_t* p) { std::memcpy(operands[T - 4], p, sizeof operands[0]); }
template <int T>
INLINE void store_tile(float* p) { std::memcpy(p, sums[T], sizeof sums[T]); }
inline float widened(uint16_t v) {
  const uint32_t bits = uint32_t{v} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <int SUM, int A, int B>
INLINE void dot() {
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 32; k++)
      for (int j = 0; j < 16; j++)
        sums[SUM][i][j] += widened(operands[A - 4][32 * i + k]) * widened(operands[B - 4][32 * (k / 2) + 2 * j + k % 2]);
}
#else
INLINE void use_tiles() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" : : "m"(config));
}
INLINE void leave_tiles() { asm volatile("tilerelease"); }
template <int T>
INLINE void clear() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
template <int T>
INLINE void load_tile(const uint16_t* p) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" : : "i"(T), "r"(p), "r"(int64_t{64}) : "memory");
}
template <int T>
INLINE void store_tile(float* p) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" : : "i"(T), "r"(p), "r"(int64_t{64}) : "memory");
}
template <int SUM, int A, int B>
INLINE void dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B)); }
#endif

// bf16(x) in the upper half of every lane, ties to even; NaN stays NaN.
INLINE Ints rounded(Floats x) {
  const Ints v = as_ints(x), odd = and_(_mm512_srli_epi32(v, 16), set1(int32_t{1}));
  const Ints up = select(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), set1(int32_t{0}), add(odd, set1(int32_t{0x7fff})));
  return and_(add(v, up), set1(static_cast<int32_t>(0xffff0000)));
}

// Lane by lane two neighbours in k, the first of them below: as hi, and as lo.
INLINE void split_pair(Floats first, Floats second, Ints& hi, Ints& lo) {
  const Ints a = rounded(first), b = rounded(second);
  hi = or_(_mm512_srli_epi32(a, 16), b);
  lo = or_(_mm512_srli_epi32(rounded(sub(first, as_floats(a))), 16), rounded(sub(second, as_floats(b))));
}

// Rows of C from `row` on, and what of k is added to them.
struct Slab {
  int64_t row, rows, begin, length, sign;
  bool rough;

  int64_t steps() const { return (length + STEP - 1) / STEP; }
  int64_t tile() const { return (rough ? 1 : 2) * PLANE; }
  int64_t panel() const { return steps() * tile(); }
};

// One matrix, as its lines lie: number k of line i is at[i line + k step].
struct Operand {
  const float* at;
  int64_t line, step;
  bool by_line;  // of a tile as it is packed: a line behind the other, or a pair of every line behind the other
};

INLINE Mask first_of(int64_t count) { return static_cast<Mask>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }

// A tile, which has so many lines and numbers of each (others are zero): hi, and lo behind it, unless rough; whether a lo is not
// zero.
ISA bool pack_tile(const Operand& x, const float* at, int64_t lines, int64_t length, bool rough, uint16_t* to) {
  alignas(64) Floats hi[16], lo[16];
  const Mask some = first_of(lines);
  if (x.line == 1) {
    for (int pair = 0; pair < 16; pair++) {
      const Floats a = _mm512_maskz_loadu_ps(2 * pair < length ? some : 0, at + 2 * pair * x.step);
      const Floats b = _mm512_maskz_loadu_ps(2 * pair + 1 < length ? some : 0, at + (2 * pair + 1) * x.step);
      Ints h, l;
      split_pair(a, b, h, l);
      hi[pair] = as_floats(h), lo[pair] = as_floats(l);
    }
  } else {
    for (int i = 0; i < 16; i++) {
      const float* line = at + i * x.line;
      const Floats a = _mm512_maskz_loadu_ps(i < lines ? first_of(length) : 0, line);
      const Floats b = _mm512_maskz_loadu_ps(i < lines ? first_of(length - 16) : 0, line + 16);
      Floats even, odd;
      split(a, b, even, odd);
      Ints h, l;
      split_pair(even, odd, h, l);
      hi[i] = as_floats(h), lo[i] = as_floats(l);
    }
  }
  if ((x.line == 1) == x.by_line) transpose(hi);
  for (int i = 0; i < 16; i++) store(reinterpret_cast<float*>(to + 32 * i), hi[i]);
  if (rough) return false;
  Ints any = set1(int32_t{0});
  for (int i = 0; i < 16; i++) any = or_(any, as_ints(lo[i]));
  const bool rest = _mm512_test_epi32_mask(any, set1(int32_t{0x7fff7fff}));
  if (rest && (x.line == 1) == x.by_line) transpose(lo);
  for (int i = 0; i < 16; i++) store(reinterpret_cast<float*>(to + PLANE + 32 * i), lo[i]);
  return rest;
}

// Panels of 16 lines, `count` of them from line `first` on, of the slab's part of k. Tile by tile all panels: what lies beside
// each other is read together.
ISA bool pack_panels(const Operand& x, const Slab& s, int64_t first, int64_t count, int64_t lines, uint16_t* to) {
  bool rest = false;
  for (int64_t k = 0; k < s.length; k += STEP)
    for (int64_t i = 0; i < count; i++) {
      const int64_t line = first + i * LINES;
      rest |= pack_tile(x, x.at + line * x.line + (s.begin + k) * x.step, std::min(LINES, lines - line),
                        std::min(STEP, s.length - k), s.rough, to + i * s.panel() + k / STEP * s.tile());
    }
  return rest;
}

// 32 lines of A by 32 of B, each two panels: [2][2][16][16].
template <bool LO_A, bool LO_B>
ISA void multiply(const uint16_t* a, const uint16_t* b, const Slab& s, float* to) {
  const int64_t panel = s.panel(), tile = s.tile();
  clear<0>(), clear<1>(), clear<2>(), clear<3>();
  for (int64_t k = s.steps(); k; k--, a += tile, b += tile) {
    load_tile<4>(a), load_tile<5>(a + panel);
    if (LO_B) {
      load_tile<6>(b + PLANE), load_tile<7>(b + panel + PLANE);
      dot<0, 4, 6>(), dot<1, 4, 7>(), dot<2, 5, 6>(), dot<3, 5, 7>();
    }
    load_tile<6>(b), load_tile<7>(b + panel);
    dot<0, 4, 6>(), dot<1, 4, 7>(), dot<2, 5, 6>(), dot<3, 5, 7>();
    if (LO_A) {
      load_tile<4>(a + PLANE), load_tile<5>(a + panel + PLANE);
      dot<0, 4, 6>(), dot<1, 4, 7>(), dot<2, 5, 6>(), dot<3, 5, 7>();
    }
  }
  store_tile<0>(to), store_tile<1>(to + 256), store_tile<2>(to + 512), store_tile<3>(to + 768);
}

// sign 0: C = the sums; else C + sign × them.
ISA void put(const float* sums, float* c, int64_t stride, int64_t rows, int64_t columns, int64_t sign) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j += 16) {
      const Mask some = first_of(columns - j);
      Floats v = load(sums + (i / 16 * 2 + j / 16) * 256 + i % 16 * 16);
      float* to = c + i * stride + j;
      if (sign) {
        const Floats before = _mm512_maskz_loadu_ps(some, to);
        v = sign > 0 ? add(before, v) : sub(before, v);
      }
      _mm512_mask_storeu_ps(to, some, v);
    }
}

int64_t padded(int64_t lines) { return (lines + 2 * LINES - 1) / (2 * LINES) * (2 * LINES); }

// Rows from `top` to `bottom` of a slab, by all its columns from `column` on, which the thread packs.
ISA void multiply_columns(const Product& job, const Slab& s, const uint16_t* a, bool lo_a, int64_t column, int64_t top,
                          int64_t bottom, uint16_t* b) {
  const Operand operand{job.b, job.b_column, job.b_row, false};
  const int64_t columns = std::min(COLUMNS, job.n - column), panel = s.panel();
  const bool lo_b = pack_panels(operand, s, column, padded(columns) / LINES, job.n, b);
  const auto multiply_two = lo_a ? lo_b ? multiply<true, true> : multiply<true, false>
                                 : lo_b ? multiply<false, true> : multiply<false, false>;
  alignas(64) float sums[1024];
  use_tiles();
  for (int64_t row = top; row < bottom; row += 2 * LINES)
    for (int64_t at = 0; at < columns; at += 2 * LINES) {
      multiply_two(a + row / LINES * panel, b + at / LINES * panel, s, sums);
      put(sums, job.c + (s.row + row) * job.c_row + column + at, job.c_row, std::min(2 * LINES, bottom - row),
          std::min(2 * LINES, columns - at), s.sign);
    }
  leave_tiles();
}

void add_slab(const Product& job, const Slab& s, uint16_t* tiles, int64_t threads, Parallel parallel) {
  const int64_t panels = padded(s.rows) / LINES, packs = (panels + PANELS - 1) / PANELS;
  std::atomic<int64_t> next{0};
  std::atomic<bool> lo{false};
  auto packing = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < packs;) {
      const Operand operand{job.a + s.row * job.a_row, job.a_row, job.a_column, true};
      if (pack_panels(operand, s, i * PANELS * LINES, std::min(PANELS, panels - i * PANELS), s.rows,
                      tiles + i * PANELS * s.panel()))
        lo = true;
    }
  };
  on_threads(threads, parallel, packing);
  // Where there are few columns, rows are shared out too.
  const int64_t across = (job.n + COLUMNS - 1) / COLUMNS, down = std::max<int64_t>(1, std::min(2 * threads / across, panels / 8));
  const int64_t height = (s.rows / down + 2 * LINES) / (2 * LINES) * (2 * LINES);
  next = 0;
  std::atomic<bool> failed{false};
  auto multiplying = [&] {
    try {
      uint16_t* b = reinterpret_cast<uint16_t*>(workspace(COLUMNS / LINES * s.panel() * sizeof(uint16_t)));
      for (int64_t i; (i = next.fetch_add(1)) < across * down;) {
        const int64_t top = i / across * height;
        multiply_columns(job, s, tiles, lo, i % across * COLUMNS, top, std::min(top + height, s.rows), b);
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  on_threads(threads, parallel, multiplying);
  if (failed) throw std::bad_alloc();
}

}  // namespace
}  // namespace llava_fa

bool llava_fa::multiplies() { return has_bf16_tiles(); }
bool llava_fa::product(const Product& job, int64_t threads, Parallel parallel) {
  try {
    const int64_t length = (std::min(LENGTH, job.k) + STEP - 1) / STEP * STEP;
    const size_t bytes = padded(std::min(ROWS, job.m)) * length * 2 * sizeof(uint16_t);
    std::unique_ptr<char[]> memory(new char[bytes + 64]);
    auto* tiles = reinterpret_cast<uint16_t*>(memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64);
    for (int64_t row = 0; row < job.m; row += ROWS)
      for (int64_t begin = 0; begin < job.k; begin += LENGTH)
        add_slab(job, {row, std::min(ROWS, job.m - row), begin, std::min(LENGTH, job.k - begin),
                       job.sign ? job.sign : begin ? 1 : 0, job.rough != 0}, tiles, threads, parallel);
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}
#else
bool llava_fa::multiplies() { return false; }
bool llava_fa::product(const Product&, int64_t, Parallel) { return false; }
#endif
