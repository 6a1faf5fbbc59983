// The C ABI that llava_fa/native.py loads: the choice of an instruction set, and the solver's kernels.
//
// A kernel takes level (0 portable, 1 AVX2, 2 AVX-512), threads and its struct of kernels.h, and returns 0, or 1 when memory
// ran out.

#include <atomic>
#include <new>

#include "kernels.h"
#include "threads.h"

using namespace llava_fa;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const Kernels* kernels(int64_t level) {
  return level == 2 ? avx512_kernels() : level == 1 ? avx2_kernels() : portable_kernels();
}

// Calls body(job, first, scratch) for first = 0, lanes, 2 lanes … below the job's rows, on up to `threads` threads.
template <typename Job>
int64_t over_rows(int64_t threads, int64_t lanes, const Job& job, size_t scratch_bytes,
                  void (*body)(const Job&, int64_t, char*)) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto work = [&] {
    std::unique_ptr<char[]> scratch(new (std::nothrow) char[scratch_bytes + 64]);
    if (!scratch) {
      failed = true;
      return;
    }
    char* aligned = scratch.get() + (64 - reinterpret_cast<uintptr_t>(scratch.get()) % 64) % 64;
    for (int64_t first; (first = next.fetch_add(lanes)) < job.rows;) body(job, first, aligned);
  };
  const int64_t chunks = (job.rows + lanes - 1) / lanes;
  on_threads(threads < chunks ? threads : chunks, nullptr, work);
  return failed ? 1 : 0;
}

}  // namespace

// Raised whenever an exported function or a struct changes, so that a library of older sources is not called.
EXPORT int64_t llava_fa_abi() { return 9; }

// The best level that this CPU and this build have.
EXPORT int64_t llava_fa_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

#define KERNEL(name, Job)                                                           \
  EXPORT int64_t llava_fa_##name(int64_t level, int64_t threads, const Job* job) {  \
    const Kernels* k = kernels(level);                                              \
    return over_rows(threads, k->lanes, *job, k->name##_scratch(*job), k->name);    \
  }

KERNEL(viterbi, Viterbi)
KERNEL(beam, Beam)
KERNEL(greedy, Greedy)
KERNEL(refine, Refine)
KERNEL(trellis_beam, TrellisBeam)

// What the kernel trellis_beam keeps of a row between two blocks.
EXPORT int64_t llava_fa_trellis_row_bytes() { return trellis_row_bytes(); }

// Products of large float32 matrices: whether this CPU has them, and one; 1 when memory ran out.
EXPORT int64_t llava_fa_multiplies(int64_t level) { return level == 2 && multiplies(); }
EXPORT int64_t llava_fa_product(int64_t threads, void* parallel, const Product* job) {
  return !product(*job, threads, reinterpret_cast<Parallel>(parallel));
}
