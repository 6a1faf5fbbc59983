// The solver's kernels for AVX-512; which CPU has it is asked in library.cpp.
#define BUILD avx512
#define SOLVER
#if defined(__x86_64__)
#define HEADER "simd_avx512.h"
#endif
#include "build.inl"
