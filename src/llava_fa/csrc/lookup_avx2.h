// Products on AVX2: of |x| with points signed by x, for vpmaddubsw's sums of two then stay below 2^15.
#pragma once

#define LLAVA_FA_INT8

#include "simd_avx2.h"

namespace llava_fa {
namespace avx2 {

constexpr const char* NAME = "avx2";
constexpr int OFFSET = 0;
constexpr int COLUMNS = 4, BLOCKS = 1, DIRECT = 2;
constexpr int direct_sums(int64_t) { return 1; }
constexpr auto FETCH = _MM_HINT_T0;
constexpr int chains(int) { return 1; }

#include "lookup_avx2.inl"

constexpr int64_t X_BYTES = 8;  // x, then |x|
// A group's x as `dot` reads it.
INLINE void lay(const int8_t* x, int8_t* to) {
  for (int i = 0; i < 256; i += 32, x += 32, to += 64) {
    const Bytes v = load_bytes(reinterpret_cast<const uint8_t*>(x)), size = _mm256_abs_epi8(v);
    const Bytes low = _mm256_unpacklo_epi32(v, size), high = _mm256_unpackhi_epi32(v, size);
    store_all(reinterpret_cast<uint8_t*>(to), _mm256_permute2x128_si256(low, high, 0x20));
    store_all(reinterpret_cast<uint8_t*>(to + 32), _mm256_permute2x128_si256(low, high, 0x31));
  }
}
INLINE void dot(Wide& sum, const Wide& w, const int8_t* x) {
  const Bytes v = four(x), size = four(x + 4), one = _mm256_set1_epi16(1);
  for (int i = 0; i < 2; i++) {
    const Bytes pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w.part[i], v));
    sum.part[i] = _mm256_add_epi32(sum.part[i], _mm256_madd_epi16(pairs, one));
    settle(sum.part[i]);
  }
}

// Of two steps, whose sums of four products fit 16 bits: one widening less.
constexpr bool PAIRED = true;
// Units of 32 of a group that have two coefficients side by side whose squares add up to more than `level`. With points p no
// longer than r, |p x + q y| ≤ r (|x| + |y|) ≤ r (2 |x|² + 2 |y|²)^½.
INLINE int32_t steep_units(const int8_t* re, const int8_t* im, int32_t level) {
  const Bytes most = _mm256_set1_epi16(static_cast<int16_t>(level < 0xffff ? level : 0xffff));
  const auto squares = [&](const int8_t* x) TILE {
    const Bytes size = _mm256_abs_epi8(load_bytes(reinterpret_cast<const uint8_t*>(x)));
    return _mm256_maddubs_epi16(size, size);
  };
  int32_t units = 0;
  for (int unit = 0; unit < 4; unit++) {
    const Bytes above = _mm256_subs_epu16(_mm256_add_epi16(squares(re + 32 * unit), squares(im + 32 * unit)), most);
    units |= !_mm256_testz_si256(above, above) << unit;
  }
  return units;
}
INLINE void dot(Wide& sum, const Wide& w, const Wide& next_w, const int8_t* x, const int8_t* next_x) {
  const Bytes v = four(x), size = four(x + 4), next = four(next_x), next_size = four(next_x + 4), one = _mm256_set1_epi16(1);
  for (int i = 0; i < 2; i++) {
    const Bytes fours = _mm256_add_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(w.part[i], v)),
                                         _mm256_maddubs_epi16(next_size, _mm256_sign_epi8(next_w.part[i], next)));
    sum.part[i] = _mm256_add_epi32(sum.part[i], _mm256_madd_epi16(fours, one));
    settle(sum.part[i]);
  }
}
}  // namespace avx2
}  // namespace llava_fa
