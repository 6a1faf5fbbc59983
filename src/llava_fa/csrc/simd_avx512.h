// Sixteen lanes of float32 on AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define ISA __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

namespace llava_fa {
namespace avx512 {

constexpr int LANES = 16;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats set1(float v) { return _mm512_set1_ps(v); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE Ints set1(int32_t v) { return _mm512_set1_epi32(v); }
INLINE Ints select(Mask m, Ints yes, Ints no) { return _mm512_mask_blend_epi32(m, no, yes); }
INLINE void store(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
// The low byte of each lane.
INLINE void store_bytes(uint8_t* p, Ints v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }

}  // namespace avx512
}  // namespace llava_fa
