// The packed layer on AVX-512 with VNNI and VBMI. Points are stored plus 128, for vpdpbusd multiplies unsigned by signed bytes.
#pragma once

#define LLAVA_FA_INT8

#ifdef LLAVA_FA_EMULATE_VBMI  // for tests on a CPU without it
#define LLAVA_FA_ISA "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#else
#define LLAVA_FA_ISA "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"
#endif
#include "simd_avx512.h"

namespace llava_fa {
namespace avx512vbmi {
using namespace avx512;

constexpr const char* NAME = "avx512vbmi";

constexpr int DIRECT = 8;
constexpr int direct_sums(int64_t) { return 8; }

#include "lookup_avx512.inl"

#include "lookup_avx512vbmi.inl"

}  // namespace avx512vbmi
}  // namespace llava_fa
