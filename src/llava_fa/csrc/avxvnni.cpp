// The packed layer for AVX2 with AVX-VNNI; which CPU has it is asked in linear.cpp, whether the assembler knows it in
// CMakeLists.txt.
#define BUILD avxvnni
#define LAYER
#if defined(LLAVA_FA_AVXVNNI)
#define HEADER "lookup_avxvnni.h"
#endif
#include "build.inl"
