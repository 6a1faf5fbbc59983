// Eight lanes of float32 on AVX2 with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define LLAVA_FA_ISA "avx2,fma"
#define ps(f) _mm256_##f##_ps
#define epi32(f) _mm256_##f##_epi32
#define si(f) _mm256_##f##_si256
#define pd(f) _mm256_##f##_pd
#define epi16(f) _mm256_##f##_epi16
#define epi8(f) _mm256_##f##_epi8

namespace llava_fa {
namespace avx2 {

constexpr int LANES = 8;
using Floats = __m256;
using Doubles = __m256d;
using Ints = __m256i;
using Mask = __m256;

#include "simd_x86.inl"

INLINE Mask less(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
INLINE Floats select(Mask m, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, m); }
INLINE Floats gather(const float* p, Ints i) { return _mm256_i32gather_ps(p, i, 4); }

INLINE Mask less(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)); }
INLINE Mask equal(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
INLINE Ints gather(const int32_t* p, Ints i) { return _mm256_i32gather_epi32(p, i, 4); }
INLINE Ints select(Mask m, Ints yes, Ints no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }
// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, Ints v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
// 32 numbers times a factor, to the nearest int8; those that are in its range.
INLINE void store_nearest(int8_t* p, const float* v, Floats factor) {
  const auto nearest = [&](int i) TILE { return _mm256_cvtps_epi32(mul(load(v + 8 * i), factor)); };
  const Ints words = _mm256_packs_epi32(nearest(0), nearest(1)), more = _mm256_packs_epi32(nearest(2), nearest(3));
  const Ints order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
  store_all(reinterpret_cast<uint8_t*>(p), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), order));
}
// Of numbers that are not negative; two bytes beyond the last may be read.
INLINE Ints gather(const int16_t* p, Ints i) { return _mm256_and_si256(_mm256_i32gather_epi32(reinterpret_cast<const int*>(p), i, 2), _mm256_set1_epi32(0xffff)); }
// As gather, from 32 floats.
INLINE Floats pick32(const float* p, Ints i) { return gather(p, i); }

// Quads: four lanes each. p[i] in all lanes of quad i; lane i of a quad from lane which[i] of it; its halves swapped.
INLINE Floats spread(const float* p) {
  return _mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0]));
}
INLINE Ints swap_neighbours(Ints v) { return _mm256_shuffle_epi32(v, _MM_SHUFFLE(2, 3, 0, 1)); }
INLINE Ints swap_halves(Ints v) { return _mm256_shuffle_epi32(v, _MM_SHUFFLE(1, 0, 3, 2)); }

INLINE Ints convert(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
INLINE Floats convert(const uint16_t* bf16) {
  return as_floats(shift_left(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16))), 16));
}

// Vector i, lane j ↔ vector j, lane i.
INLINE void transpose(Floats* v) {
  transpose_quads(v);
  for (int i = 0; i < 4; i++) {
    const Floats a = v[i], b = v[i + 4];
    v[i] = _mm256_permute2f128_ps(a, b, 0x20);
    v[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}

INLINE Floats reverse(Floats v) { return _mm256_permutevar8x32_ps(v, _mm256_set_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
// Every second of the numbers in a and then b, from the first and from the second on.
INLINE void split(Floats a, Floats b, Floats& even, Floats& odd) {
  const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), o = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
  even = _mm256_castpd_ps(_mm256_permute4x64_pd(e, 0xd8));
  odd = _mm256_castpd_ps(_mm256_permute4x64_pd(o, 0xd8));
}

}  // namespace avx2
}  // namespace llava_fa
