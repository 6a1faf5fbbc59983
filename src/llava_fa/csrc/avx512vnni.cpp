// The packed layer for AVX-512 with VNNI; which CPU has it is asked in linear.cpp.
#define BUILD avx512vnni
#define LAYER
#if defined(__x86_64__)
#define HEADER "lookup_avx512vnni.h"
#endif
#include "build.inl"
