// The packed layer for AVX-512 with VNNI and VBMI; which CPU has it is asked in linear.cpp.
#define BUILD avx512vbmi
#define LAYER
#if defined(__x86_64__)
#define HEADER "lookup_avx512vbmi.h"
#endif
#include "build.inl"
