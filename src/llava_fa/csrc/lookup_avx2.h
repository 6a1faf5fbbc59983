// Products on AVX2: of |x| with points signed by x, for vpmaddubsw's sums of two then stay below 2^15.
#pragma once

#define LLAVA_FA_INT8

#include "simd_avx2.h"

namespace llava_fa {
namespace avx2 {

constexpr const char* NAME = "avx2";
constexpr int OFFSET = 0;
constexpr int COLUMNS = 4, BLOCKS = 1, DIRECT = 4, DIRECT_SUMS = 2;
constexpr int chains(int) { return 1; }

#include "lookup_avx2.inl"

constexpr int64_t X_BYTES = 8;  // x, then |x|
INLINE void dot(Wide& sum, const Wide& w, const int8_t* x) {
  const Bytes v = four(x), size = four(x + 4), one = _mm256_set1_epi16(1);
  for (int i = 0; i < 2; i++) {
    const Bytes pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w.part[i], v));
    sum.part[i] = _mm256_add_epi32(sum.part[i], _mm256_madd_epi16(pairs, one));
    settle(sum.part[i]);
  }
}
}  // namespace avx2
}  // namespace llava_fa
