// The kernels for any CPU.
#define BUILD portable
#define SOLVER
#define LAYER
#define HEADER "lookup_portable.h"
#include "build.inl"

int64_t llava_fa::trellis_row_bytes() { return sizeof(portable::TrellisRow); }
