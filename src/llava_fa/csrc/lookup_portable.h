// Vectors of bytes for any CPU. Without instructions for them int8 products are no faster than float32's: x stays exact.
#pragma once

#include "simd_portable.h"

namespace llava_fa {
namespace portable {

constexpr const char* NAME = "portable";
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

}  // namespace portable
}  // namespace llava_fa
