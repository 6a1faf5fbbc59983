// One build of the kernels. BUILD is its name; HEADER has its vectors, and is not defined where the build cannot be made: its
// tables are null then. SOLVER asks for the kernels of kernels.h, LAYER for those of linear.h.
#include <cstring>

#include "dft.h"
#include "kernels.h"
#include "linear.h"

#define JOIN(a, b) a##b
#define NAME_OF(build, table) JOIN(build, table)

#ifdef HEADER
#include HEADER

namespace llava_fa {
namespace BUILD {
#ifdef SOLVER
#include "some.inl"
#include "viterbi.inl"
#include "nearest.inl"
#include "beam.inl"
#include "greedy.inl"
#include "refine.inl"
#include "trellis_beam.inl"

const Kernels solver{LANES,  viterbi_scratch, viterbi,        beam_scratch, beam,
                     greedy_scratch, greedy, refine_scratch, refine,       trellis_beam_scratch,
                     trellis_beam};
#endif
#ifdef LAYER
#include "linear.inl"
#include "dft.inl"

const LinearKernels layer{NAME,           plan_for_lanes,  dft_scratch, packed_dft, X_BYTES,    quantise,   int8_tables,
                          trellis_tables, trellis_addends, BLOCKS * BUFFER, int8_rows,  float_rows, dot_floats, finish,
                          widen_all};
#endif
}  // namespace BUILD
}  // namespace llava_fa

#define TABLE_OF(kernels) &llava_fa::BUILD::kernels
#else
#define TABLE_OF(kernels) nullptr
#endif

#ifdef SOLVER
const llava_fa::Kernels* llava_fa::NAME_OF(BUILD, _kernels)() { return TABLE_OF(solver); }
#endif
#ifdef LAYER
const llava_fa::LinearKernels* llava_fa::NAME_OF(BUILD, _linear)() { return TABLE_OF(layer); }
#endif
