// The kernels for AVX2 and FMA; which CPU has it is asked in library.cpp.
#define BUILD avx2
#define SOLVER
#define LAYER
#if defined(__x86_64__)
#define HEADER "lookup_avx2.h"
#endif
#include "build.inl"
