// Products on AVX2 with AVX-VNNI, as CPUs without AVX-512 have them. Points are stored plus 128, for vpdpbusd multiplies unsigned
// by signed bytes.
#pragma once

#define LLAVA_FA_INT8

#include "simd_avx2.h"

namespace llava_fa {
namespace avxvnni {
using namespace avx2;

constexpr const char* NAME = "avxvnni";
constexpr int OFFSET = 128;
constexpr int COLUMNS = 6, BLOCKS = 1;

#include "lookup_avx2.inl"

// _mm256_dpbusd_avx_epi32 (see lookup_avx512.inl).
INLINE void dot(Sums& sum, const uint8_t* w, int32_t x) {
  const Bytes v = _mm256_set1_epi32(x);
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.half[0]) : "x"(load_bytes(w)), "x"(v));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.half[1]) : "x"(load_bytes(w + 32)), "x"(v));
}

}  // namespace avxvnni
}  // namespace llava_fa
