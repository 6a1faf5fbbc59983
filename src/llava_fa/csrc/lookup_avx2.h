// Products on AVX2: of |x| with points signed by x, for vpmaddubsw's sums of two then stay below 2^15.
#pragma once

#define LLAVA_FA_INT8

#include "simd_avx2.h"

namespace llava_fa {
namespace avx2 {

constexpr const char* NAME = "avx2";
constexpr int OFFSET = 0;
constexpr int COLUMNS = 4, BLOCKS = 1;

#include "lookup_avx2.inl"

INLINE void dot(Sums& sum, const uint8_t* w, int32_t x) {
  const __m256i v = _mm256_set1_epi32(x), size = _mm256_abs_epi8(v);
  for (int i = 0; i < 2; i++) {
    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(load_bytes(w + 32 * i), v));
    sum.half[i] = _mm256_add_epi32(sum.half[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
}
}  // namespace avx2
}  // namespace llava_fa
