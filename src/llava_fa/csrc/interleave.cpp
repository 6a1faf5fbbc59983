// Codes as stored (docs/format.md) ↔ in the order of the kernels (kernels/interleaved.py).

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "linear.h"

using namespace llava_fa;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// One unit of one block: c_q, four coefficients of ROWS rows a vector, one code a byte.
using Unit = uint8_t[8][64];

// Eight codes are b bytes; of them and what follows, `left` bytes are there.
inline __attribute__((always_inline)) void read_eight(const uint8_t* from, int64_t left, int b, uint8_t* low, uint8_t* high) {
  uint64_t bits = 0;
  if (left >= 8)
    std::memcpy(&bits, from, 8);
  else
    std::memcpy(&bits, from, static_cast<size_t>(left));
  const uint64_t mask = (1u << b) - 1;
  for (int i = 0; i < 4; i++) low[i] = static_cast<uint8_t>(bits >> b * i & mask);
  for (int i = 0; i < 4; i++) high[i] = static_cast<uint8_t>(bits >> b * (i + 4) & mask);
}

inline __attribute__((always_inline)) void write_eight(uint8_t* to, int64_t left, int b, const uint8_t* low, const uint8_t* high) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; i++) bits |= uint64_t{low[i]} << b * i | uint64_t{high[i]} << b * (i + 4);
  std::memcpy(to, &bits, static_cast<size_t>(std::min<int64_t>(b, left)));
}

// Fields of 8, 4, 2 and 1 bits, of as many vectors; from the low bits of a code on. Of each: which c_q and which vector it is
// of, the lowest of its bits in a code, its place in a byte of the vector, and its bits there.
template <class F>
inline __attribute__((always_inline)) void over_fields(int b, F f) {
  for (int width = 8, low = 0, vector = 0; width; width /= 2) {
    if (width == 8 ? b != 8 : b == 8 || !(b & width)) continue;
    for (int q = 0; q < 8; vector++)
      for (int place = 0; place < 8; place += width) f(q++, vector, low, place, (1 << width) - 1);
    low += width;
  }
}

inline __attribute__((always_inline)) void join(const Unit& c, int b, uint8_t* vectors) {
  over_fields(b, [&](int q, int vector, int low, int place, int mask) {
    uint8_t* to = vectors + 64 * vector;
    for (int i = 0; i < 64; i++) to[i] = static_cast<uint8_t>(to[i] | (c[q][i] >> low & mask) << place);
  });
}

inline __attribute__((always_inline)) void part(const uint8_t* vectors, int b, Unit& c) {
  std::memset(c, 0, sizeof c);
  over_fields(b, [&](int q, int vector, int low, int place, int mask) {
    const uint8_t* from = vectors + 64 * vector;
    for (int i = 0; i < 64; i++) c[q][i] = static_cast<uint8_t>(c[q][i] | (from[i] >> place & mask) << low);
  });
}

template <int B, bool BACK>
void rings(const Interleave& job) {
  const int64_t row_bytes = (job.coefficients * B + 7) / 8, units = (job.coefficients + UNIT - 1) / UNIT;
  for (int64_t first = 0; first < job.m; first += ROWS)
    for (int64_t unit = 0; unit < units; unit++) {
      const int64_t rows = std::min(ROWS, job.m - first), at = (first / ROWS * units + unit) * B * 64;
      Unit c = {};
      if (BACK) part(job.source + at, B, c);
      for (int64_t row = 0; row < rows; row++)
        for (int eight = 0; eight < 4; eight++) {
          const int64_t byte = unit * UNIT / 8 * B + eight * B, left = row_bytes - byte;
          uint8_t *low = c[2 * eight] + 4 * row, *high = c[2 * eight + 1] + 4 * row;
          if (left <= 0) break;
          if (BACK)
            write_eight(job.to + (first + row) * row_bytes + byte, left, B, low, high);
          else
            read_eight(job.source + (first + row) * row_bytes + byte, left, B, low, high);
        }
      if (!BACK) join(c, B, job.to + at);
    }
}

// Shifts and masks are known when compiled: they are most of the work.
template <int B>
void rings_of(const Interleave& job) {
  if (B != job.code_bits) return rings_of<B + 1>(job);
  job.back ? rings<B, true>(job) : rings<B, false>(job);
}

template <>
void rings_of<9>(const Interleave&) {}

void trellis(const uint8_t* from, uint8_t* to, int64_t m, int64_t row_bytes, int64_t words, int64_t code_bits, bool back) {
  for (int64_t row = 0; row < m; row++)
    for (int64_t i = 0; i < row_bytes; i++) {
      const int64_t unit = i / (4 * code_bits), half = i / (2 * code_bits) % 2, word = unit * code_bits + i / 2 % code_bits;
      const int64_t other = (row / ROWS * words + word) * 64 + row % ROWS * 4 + half * 2 + i % 2;
      const int64_t stored = row * row_bytes + i;
      if (back)
        to[stored] = from[other];
      else
        to[other] = from[stored];
    }
}

}  // namespace

// source → to, which is zero at first.
EXPORT void llava_fa_interleave(const Interleave* job) {
  if (!job->state_bits) return rings_of<2>(*job);
  const int64_t b = job->code_bits, count = job->coefficients;
  const int64_t row_bytes = (count * b + job->state_bits - b + 7) / 8, words = trellis_words(count, b, job->state_bits);
  trellis(job->source, job->to, job->m, row_bytes, words, b, job->back != 0);
}
