// The packed layer for AVX-512 with VNNI, VBMI and AMX; which CPU has it is asked in linear.cpp, whether the compiler knows it in
// CMakeLists.txt.
#define BUILD avx512amx
#define LAYER
#if defined(LLAVA_FA_AMX)
#define HEADER "lookup_avx512amx.h"
#endif
#include "build.inl"
