// Codes → int8 points for any CPU, byte by byte.
#pragma once

#include "simd_portable.h"

namespace llava_fa {
namespace portable {

constexpr const char* NAME = "portable";
constexpr int OFFSET = 0;
constexpr int COLUMNS = 2, BLOCKS = 1;

typedef uint8_t Bytes __attribute__((vector_size(16)));
INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store_all(uint8_t* p, Bytes v) { std::memcpy(p, &v, sizeof v); }
template <int BY>
INLINE Bytes shift(Bytes v) {
  return BY > 0 ? v >> (BY > 0 ? BY : 0) : BY < 0 ? v << (BY < 0 ? -BY : 0) : v;
}
INLINE Bytes masked(Bytes v, int mask) { return v & static_cast<uint8_t>(mask); }
INLINE Bytes select_bits(int mask, Bytes yes, Bytes no) {
  return (yes & static_cast<uint8_t>(mask)) | (no & static_cast<uint8_t>(~mask));
}

constexpr bool planes(int) { return true; }

template <int BITS>
struct Table {
  const uint8_t* t;  // re of all points, then im

  INLINE void load(Table& self, const uint8_t* p) { self.t = p; }

  INLINE void look(const Table& self, Bytes c, Bytes& a, Bytes& b) {
    constexpr int POINTS = BITS <= 4 ? 16 : 1 << BITS;
    const Bytes index = masked(c, POINTS - 1);
    for (int i = 0; i < 16; i++) {
      a[i] = self.t[index[i]];
      b[i] = self.t[POINTS + index[i]];
    }
  }
};

struct Sums {
  int32_t row[16];
};
INLINE Sums sums(int32_t v) {
  Sums s;
  for (int32_t& row : s.row) row = v;
  return s;
}
INLINE void dot(Sums& sum, const uint8_t* w, int32_t x) {
  int8_t v[4];
  std::memcpy(v, &x, sizeof v);
  for (int row = 0; row < 16; row++)
    for (int i = 0; i < 4; i++) sum.row[row] += static_cast<int8_t>(w[4 * row + i]) * v[i];
}
INLINE void accumulate(float* y, const Sums& sum, float scale) {
  for (int row = 0; row < 16; row++) y[row] += static_cast<float>(sum.row[row]) * scale;
}

template <int BITS>
INLINE Ints pick(const int32_t* t, Ints i) {
  return gather(t, i);
}

}  // namespace portable
}  // namespace llava_fa
