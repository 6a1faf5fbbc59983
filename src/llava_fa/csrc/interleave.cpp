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

// Eight codes are b bytes; `some` of them are there.
void read_eight(const uint8_t* from, int64_t some, int b, uint8_t* low, uint8_t* high) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, static_cast<size_t>(some));
  const uint64_t mask = (1u << b) - 1;
  for (int i = 0; i < 4; i++) low[i] = static_cast<uint8_t>(bits >> b * i & mask);
  for (int i = 0; i < 4; i++) high[i] = static_cast<uint8_t>(bits >> b * (i + 4) & mask);
}

void write_eight(uint8_t* to, int64_t some, int b, const uint8_t* low, const uint8_t* high) {
  uint64_t bits = 0;
  for (int i = 0; i < 4; i++) bits |= uint64_t{low[i]} << b * i | uint64_t{high[i]} << b * (i + 4);
  std::memcpy(to, &bits, static_cast<size_t>(some));
}

// Fields of 8, 4, 2 and 1 bits, of as many vectors; from the low bits of a code on. Of each: which c_q and which vector it is
// of, the lowest of its bits in a code, its place in a byte of the vector, and its bits there.
template <class F>
void over_fields(int b, F f) {
  for (int width = 8, low = 0, vector = 0; width; width /= 2) {
    if (width == 8 ? b != 8 : b == 8 || !(b & width)) continue;
    for (int q = 0; q < 8; vector++)
      for (int place = 0; place < 8; place += width) f(q++, vector, low, place, (1 << width) - 1);
    low += width;
  }
}

void join(const Unit& c, int b, uint8_t* vectors) {
  over_fields(b, [&](int q, int vector, int low, int place, int mask) {
    uint8_t* to = vectors + 64 * vector;
    for (int i = 0; i < 64; i++) to[i] = static_cast<uint8_t>(to[i] | (c[q][i] >> low & mask) << place);
  });
}

void part(const uint8_t* vectors, int b, Unit& c) {
  std::memset(c, 0, sizeof c);
  over_fields(b, [&](int q, int vector, int low, int place, int mask) {
    const uint8_t* from = vectors + 64 * vector;
    for (int i = 0; i < 64; i++) c[q][i] = static_cast<uint8_t>(c[q][i] | (from[i] >> place & mask) << low);
  });
}

void rings(const uint8_t* from, uint8_t* to, int64_t m, int64_t count, int b, bool back) {
  const int64_t row_bytes = (count * b + 7) / 8, units = (count + UNIT - 1) / UNIT;
  for (int64_t first = 0; first < m; first += ROWS)
    for (int64_t unit = 0; unit < units; unit++) {
      const int64_t rows = std::min(ROWS, m - first), at = (first / ROWS * units + unit) * b * 64;
      Unit c = {};
      if (back) part(from + at, b, c);
      for (int64_t row = 0; row < rows; row++)
        for (int eight = 0; eight < 4; eight++) {
          const int64_t byte = unit * UNIT / 8 * b + eight * b, some = std::min<int64_t>(b, row_bytes - byte);
          uint8_t *low = c[2 * eight] + 4 * row, *high = c[2 * eight + 1] + 4 * row;
          if (some <= 0) break;
          if (back)
            write_eight(to + (first + row) * row_bytes + byte, some, b, low, high);
          else
            read_eight(from + (first + row) * row_bytes + byte, some, b, low, high);
        }
      if (!back) join(c, b, to + at);
    }
}

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
  const int64_t b = job->code_bits, count = job->coefficients;
  if (!job->state_bits) return rings(job->source, job->to, job->m, count, static_cast<int>(b), job->back != 0);
  const int64_t row_bytes = (count * b + job->state_bits - b + 7) / 8, words = trellis_words(count, b, job->state_bits);
  trellis(job->source, job->to, job->m, row_bytes, words, b, job->back != 0);
}
