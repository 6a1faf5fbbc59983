// The C ABI that llava_fa/native.py loads, the choice of an instruction set, and the threads.
//
// Every kernel takes level (0 portable, 1 AVX2, 2 AVX-512) and threads first, then its own arguments, all int64_t or
// pointers, and returns 0, or 1 when memory ran out. Threads live for one call only, so that fork is safe.

#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace llava_fa;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const Kernels* kernels(int64_t level) {
  return level == 2 ? avx512_kernels() : level == 1 ? avx2_kernels() : portable_kernels();
}

// Calls body(job, first, scratch) for first = 0, lanes, 2 lanes … below rows, on up to `threads` threads.
template <typename Job>
int64_t over_rows(int64_t threads, int64_t lanes, int64_t rows, size_t scratch_bytes, const Job& job,
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
    for (int64_t first; (first = next.fetch_add(lanes)) < rows;) body(job, first, aligned);
  };
  std::vector<std::thread> others;
  const int64_t chunks = (rows + lanes - 1) / lanes;
  try {
    for (int64_t i = 1; i < threads && i < chunks; i++) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
  } catch (const std::bad_alloc&) {
  }
  work();
  for (auto& thread : others) thread.join();
  return failed ? 1 : 0;
}

}  // namespace

// Raised whenever an exported function changes, so that a library of older sources is not called.
EXPORT int64_t llava_fa_abi() { return 5; }

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

EXPORT int64_t llava_fa_viterbi(int64_t level, int64_t threads, const float* target, int64_t steps, int64_t rows,
                                const float* table, int64_t state_bits, int64_t code_bits, int32_t* states) {
  const Kernels* k = kernels(level);
  const Viterbi job{target, steps, rows, table, state_bits, code_bits, states};
  return over_rows(threads, k->lanes, rows, k->viterbi_scratch(job), job, k->viterbi);
}

EXPORT int64_t llava_fa_beam(int64_t level, int64_t threads, float* target, float* base, int64_t columns, int64_t rows,
                             const float* unit, const float* metric, const float* tried, const int32_t* numbers,
                             const int32_t* cells, const int32_t* candidates, const float* points,
                             const float* half_norm, int64_t side, int64_t width, int64_t count, double reach,
                             int32_t* codes) {
  const Kernels* k = kernels(level);
  const Nearest search{cells, candidates, points, half_norm, side, width, count, static_cast<float>(reach)};
  const Beam job{target, base, columns, rows, unit, metric, tried, numbers, search, codes};
  return over_rows(threads, k->lanes, rows, k->beam_scratch(job), job, k->beam);
}

EXPORT int64_t llava_fa_greedy(int64_t level, int64_t threads, float* target, float* base, int64_t columns, int64_t rows,
                               const float* unit, const int32_t* cells, const int32_t* candidates, const float* points,
                               const float* half_norm, int64_t side, int64_t width, int64_t count, double reach,
                               int32_t* codes) {
  const Kernels* k = kernels(level);
  const Nearest search{cells, candidates, points, half_norm, side, width, count, static_cast<float>(reach)};
  const Greedy job{target, base, columns, rows, unit, search, codes};
  return over_rows(threads, k->lanes, rows, k->greedy_scratch(job), job, k->greedy);
}

EXPORT int64_t llava_fa_refine(int64_t level, int64_t threads, float* error, float* gradient, int64_t columns,
                               int64_t rows, const float* moment, const float* inverse, const int32_t* cells,
                               const int32_t* candidates, const float* points, const float* half_norm, int64_t side,
                               int64_t width, int64_t count, double reach, int32_t* codes, int32_t* changed) {
  const Kernels* k = kernels(level);
  const Nearest search{cells, candidates, points, half_norm, side, width, count, static_cast<float>(reach)};
  const Refine job{error, gradient, columns, rows, moment, inverse, search, codes, changed};
  return over_rows(threads, k->lanes, rows, k->refine_scratch(job), job, k->refine);
}

// What round_trellis keeps of a row between two blocks.
EXPORT int64_t llava_fa_trellis_row_bytes() { return trellis_row_bytes(); }

EXPORT int64_t llava_fa_trellis_beam(int64_t level, int64_t threads, float* target, const float* base,
                                     int64_t start, int64_t columns, int64_t size, int64_t rows, const float* unit,
                                     int64_t ahead, const float* metric, const int32_t* points, int64_t code_bits,
                                     const int16_t* lists, const int16_t* first, int64_t side, int64_t tried,
                                     int64_t tried_first, double reach, char* paths, int32_t* states) {
  const Kernels* k = kernels(level);
  const TrellisBeam job{target, base,  start, columns, size,  rows,        unit,
                        ahead,  metric, points, code_bits, lists, first,   side,
                        tried,  tried_first, static_cast<float>(reach), paths, states};
  return over_rows(threads, k->lanes, rows, k->trellis_beam_scratch(job), job, k->trellis_beam);
}
