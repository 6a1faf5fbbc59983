// One packed layer times a batch of vectors: the choice of an instruction set, plans kept, the threads and the epilogue.

#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "dft.h"
#include "kernels.h"
#include "part.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

using namespace llava_fa;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

#if defined(__x86_64__)
bool has_vbmi() {
#if defined(LLAVA_FA_EMULATE_VBMI)
  return true;
#elif defined(LLAVA_FA_WITHOUT_VBMI)  // for tests on a CPU with it
  return false;
#else
  return __builtin_cpu_supports("avx512vbmi");
#endif
}

bool has_avxvnni() {  // not every compiler's __builtin_cpu_supports knows it; asked once, for it takes microseconds in a VM
  static const bool has = [] {
    unsigned a = 0, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
  }();
  return has;
}
#endif

// level: 0 portable, 1 AVX2, 2 AVX-512, which without VNNI is served by AVX2; each with what more of it the CPU has.
const LinearKernels* linear_kernels(int64_t level) {
#if defined(__x86_64__)
  if (level == 2 && avx512vnni_linear() && __builtin_cpu_supports("avx512vnni"))
    return has_vbmi() ? avx512vbmi_linear() : avx512vnni_linear();
  if (level >= 1 && avx2_linear()) return avxvnni_linear() && has_avxvnni() ? avxvnni_linear() : avx2_linear();
#endif
  (void)level;
  return portable_linear();
}

std::shared_ptr<const Dft> plan_of(const LinearKernels* kernels, int64_t size) {
  static std::mutex guard;
  static std::map<std::pair<const LinearKernels*, int64_t>, std::shared_ptr<const Dft>> plans;
  const std::lock_guard<std::mutex> lock(guard);
  auto& plan = plans[{kernels, size}];
  if (!plan) plan = kernels->plan(size);
  return plan;
}

// Working memory that a thread keeps from call to call: the largest it ever needed.
char* workspace(size_t bytes) {
  struct Space {
    std::unique_ptr<char[]> memory;
    size_t size = 0;
  };
  static thread_local Space space;
  if (space.size < bytes + 64) {
    space.memory.reset();
    space.size = 0;
    space.memory.reset(new char[bytes + 64]);
    space.size = bytes + 64;
  }
  return space.memory.get() + (64 - reinterpret_cast<uintptr_t>(space.memory.get()) % 64) % 64;
}

// Whether 256 points, bf16 (re, im), are 64 and their reflections: re minus at the codes with bit 7, im at those with bit 6.
bool is_quadrant(const uint16_t* codebook) {
  uint32_t other = 0;
  for (int code = 64; code < 256; code++) {
    const uint16_t *first = codebook + 2 * (code & 63), *point = codebook + 2 * code;
    other |= first[0] ^ point[0] ^ (code & 128u) << 8;
    other |= first[1] ^ point[1] ^ (code & 64u) << 9;
  }
  return other == 0;
}

// What a build makes of a codebook of trellis codes.
struct Windows {
  const LinearKernels* kernels;
  int64_t code_bits, state_bits;
  std::vector<uint16_t> codebook;
  std::vector<uint8_t> tables;
  float step;
  bool added;  // points are sums of the parts
  uint8_t parts[ADDENDS];
};

// Kept for the last few codebooks used, for it takes longer than a small layer; told apart by all of their numbers.
std::shared_ptr<const Windows> windows_of(const LinearKernels* kernels, const uint16_t* codebook, int64_t code_bits,
                                          int64_t state_bits) {
  static std::mutex guard;
  static std::vector<std::shared_ptr<const Windows>> kept;
  const size_t count = size_t{2} << state_bits;
  const std::lock_guard<std::mutex> lock(guard);
  for (auto one = kept.begin(); one != kept.end(); ++one)
    if ((*one)->kernels == kernels && (*one)->code_bits == code_bits && (*one)->state_bits == state_bits &&
        !std::memcmp((*one)->codebook.data(), codebook, count * sizeof *codebook)) {
      std::rotate(one, one + 1, kept.end());
      return kept.back();
    }
  auto made = std::make_shared<Windows>();
  made->kernels = kernels;
  made->code_bits = code_bits;
  made->state_bits = state_bits;
  made->codebook.assign(codebook, codebook + count);
  made->tables.resize(trellis_table_bytes(state_bits));
  made->step = kernels->trellis_tables(codebook, state_bits, made->tables.data());
  made->added = kernels->trellis_addends && kernels->trellis_addends(made->tables.data(), code_bits, state_bits, made->parts);
  if (kept.size() == 8) kept.erase(kept.begin());
  kept.push_back(made);
  return made;
}

// GOMP_parallel of the OpenMP runtime that torch runs on, so that its threads are ours: no second pool beside it.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <typename Body>
void on_threads(int64_t threads, Parallel parallel, Body& body) {
  if (threads <= 1) return body();
  if (parallel) {
    parallel([](void* data) { (*static_cast<Body*>(data))(); }, &body, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; i++) others.emplace_back([&] { body(); });
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
  } catch (const std::bad_alloc&) {
  }
  body();
  for (auto& thread : others) thread.join();
}

// What a thread that waits does, so that one that shares its core runs at full speed.
void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

float bf16(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Call {
  const LinearKernels* kernels;
  const char* x;
  int64_t kind, batch;  // of x and out: 0 bf16, 2 float32
  char* out;
  const uint16_t *row_scale, *input_scale;
  const uint8_t* signs;
  const char *left, *right;
  const uint16_t *left_scale, *right_scale;
  int64_t rank, factor_kind;  // 3 int8, 0 bf16
  const char* bias;
  int64_t bias_kind, m, n;
  bool exact;
  Linear job;
  float step;
  const Dft* dft;
  // Working memory that all threads share.
  int8_t* x_int8;
  float *x_scale, *x_float, *x_wide, *inner;
  int32_t* x_bias;
  std::atomic<int64_t> next{0}, done{0}, arrived{0};
  std::atomic<bool> failed{false};
  Part* parts;  // of each thread
  int64_t threads, at_once;

  int64_t element() const { return kind == 2 ? 4 : 2; }
  // Rows of R that one task takes.
  static constexpr int64_t RIGHT = 8;
  // Bytes of codes that a thread fetches while it waits: what most cores' own cache has room for.
  static constexpr int64_t AHEAD = 1 << 18;
  int64_t block_codes() const { return job.state_bits ? job.words * 64 : job.units * job.code_bits * 64; }  // bytes
  int64_t first_tasks() const { return batch + (rank + RIGHT - 1) / RIGHT; }

  void transform(int64_t column, char* scratch) {
    const int64_t half = dft->half;
    float* re = reinterpret_cast<float*>(scratch);
    float *im = re + half + 64, *rest = im + half + 64;
    kernels->dft(*dft, x + column * n * element(), kind, n, input_scale, signs, re, im, rest);
    if (!exact) {
      kernels->quantise(job, column, re, im, half, x_int8, x_scale, x_bias);
      return;
    }
    float* to = x_float + column * job.units * UNIT * 2;
    for (int64_t f = 0; f < half; f++) {
      to[2 * f] = re[f];
      to[2 * f + 1] = im[f];
    }
    for (int64_t f = 2 * half; f < job.units * UNIT * 2; f++) to[f] = 0;
  }

  // inner [batch, rank] = diag(left_scale right_scale) R x
  void times_right(int64_t task) {
    for (int64_t r = task * RIGHT; r < rank && r < (task + 1) * RIGHT; r++) {
      const float scale = left_scale ? bf16(left_scale + r) * bf16(right_scale + r) : 1.0f;
      const char* row = right + r * n * (factor_kind == 3 ? 1 : 2);
      for (int64_t c = 0; c < batch; c++) inner[c * rank + r] = scale * kernels->dot(row, factor_kind, x_wide + c * n, n);
    }
  }

  void rows(int64_t first, int64_t count, float* y, char* scratch) {
    (exact ? kernels->exact : kernels->int8)(job, first, count, y, scratch);
    for (int64_t b = 0; b < count; b++) {
      const int64_t row = (first + b) * ROWS, some = m - row < ROWS ? m - row : ROWS;
      float scale[ROWS], added[ROWS] = {};
      for (int64_t i = 0; i < some; i++) scale[i] = bf16(row_scale + row + i) * step;
      if (bias) kernels->widen(bias + row * (bias_kind == 2 ? 4 : 2), bias_kind, some, added);
      for (int64_t c = 0; c < batch; c++) {
        float* values = y + (b * batch + c) * ROWS;
        for (int64_t i = 0; i < some; i++) values[i] *= scale[i];
        if (rank)
          for (int64_t i = 0; i < some; i++)
            values[i] += kernels->dot(left + (row + i) * rank * (factor_kind == 3 ? 1 : 2), factor_kind, inner + c * rank, rank);
        for (int64_t i = 0; i < some; i++) values[i] += added[i];
        kernels->round(values, some, out + (c * m + row) * element(), kind);
      }
    }
  }

  // The next blocks of rows for a thread: of its own part, else of another's.
  std::pair<int64_t, int64_t> take(int64_t thread) {
    for (int64_t i = 0; i < threads; i++) {
      const auto taken = parts[(thread + i) % threads].take(static_cast<uint32_t>(at_once), i > 0);
      if (taken.second) return taken;
    }
    return {0, 0};
  }

  // What every thread does: transforms and the small product first; when all of them are done, blocks of rows.
  void work() try {
    const int64_t thread = arrived.fetch_add(1);
    const size_t transform_bytes = (2 * (static_cast<size_t>(dft->half) + 64) + kernels->dft_scratch(*dft)) * sizeof(float);
    const size_t y_bytes = static_cast<size_t>(at_once * batch * ROWS) * sizeof(float);
    const size_t block_bytes = y_bytes + static_cast<size_t>(at_once) * kernels->scratch;
    char* scratch = workspace(transform_bytes > block_bytes ? transform_bytes : block_bytes);
    const int64_t tasks = first_tasks();
    for (int64_t task; (task = next.fetch_add(1)) < tasks; done.fetch_add(1)) {
      if (task < batch)
        transform(task, scratch);
      else
        times_right(task - batch);
    }
    // While another transforms x, the codes that this thread begins with come into its cache.
    auto [first, count] = take(thread);
    const uint8_t* codes = job.codes + first * block_codes();
    int64_t fetched = 0;
    const int64_t wanted = std::min(AHEAD, (count + parts[thread].left()) * block_codes());
    for (int64_t spins = 0; done.load(std::memory_order_acquire) < tasks; spins++) {
      if (failed) return;
      if (fetched < wanted)
        for (const int64_t stop = fetched + 1024; fetched < stop && fetched < wanted; fetched += 64)
          __builtin_prefetch(codes + fetched, 0, 2);
      else if (spins > 1 << 14)  // longer than any transform takes: a thread that does one has no core
        std::this_thread::yield();
      else
        pause();
    }
    for (; count; std::tie(first, count) = take(thread))
      rows(first, count, reinterpret_cast<float*>(scratch), scratch + y_bytes);
  } catch (const std::bad_alloc&) {
    failed = true;
  }
};

int64_t run(Call& call, int64_t threads, Parallel parallel) {
  const Linear& job = call.job;
  const size_t columns = static_cast<size_t>(call.batch), groups = static_cast<size_t>(job.groups);
  std::vector<int8_t> x_int8;
  std::vector<float> floats;
  std::vector<int32_t> x_bias;
  const size_t wide = call.rank ? columns * static_cast<size_t>(call.n + call.rank) : 0;
  if (call.exact) {
    floats.resize(columns * static_cast<size_t>(job.units * UNIT * 2) + wide);
    call.x_float = floats.data();
    call.x_wide = floats.data() + columns * static_cast<size_t>(job.units * UNIT * 2);
  } else {
    x_int8.resize(columns * groups * GROUP * UNIT * 2);
    x_bias.resize(columns * groups);
    floats.resize(columns * groups + wide);
    call.x_int8 = x_int8.data();
    call.x_bias = x_bias.data();
    call.x_scale = floats.data();
    call.x_wide = floats.data() + columns * groups;
  }
  if (call.rank) {
    call.inner = call.x_wide + columns * static_cast<size_t>(call.n);
    call.kernels->widen(call.x, call.kind, call.batch * call.n, call.x_wide);
  }
  call.job.x = call.x_int8;
  call.job.x_scale = call.x_scale;
  call.job.x_bias = call.x_bias;
  call.job.x_float = call.x_float;
  // Blocks at a time: few enough that all threads have some, and about 64 KB of codes for a thread to read on in.
  const int64_t bytes = call.block_codes();
  int64_t at_once = bytes > 1 << 16 ? 1 : (1 << 16) / bytes;
  if (call.batch > 1 && at_once < 4) at_once = 4;  // where points are kept, x goes through the cache once for all of them
  if (at_once > 16) at_once = 16;
  while (at_once > 1 && at_once * 4 * threads > job.blocks) at_once /= 2;
  call.at_once = at_once;
  call.threads = threads = std::max<int64_t>(threads, 1);
  std::vector<Part> parts(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; i++)
    parts[static_cast<size_t>(i)].set(static_cast<uint32_t>(job.blocks * i / threads),
                                      static_cast<uint32_t>(job.blocks * (i + 1) / threads));
  call.parts = parts.data();
  auto body = [&] { call.work(); };
  on_threads(threads, parallel, body);
  return call.failed ? 1 : 0;
}

}  // namespace

// Which implementation a level means on this CPU.
EXPORT const char* llava_fa_linear_name(int64_t level) { return linear_kernels(level)->name; }

// Whether it multiplies int8 with int8.
EXPORT int64_t llava_fa_linear_int8(int64_t level) { return linear_kernels(level)->int8 != nullptr; }

// Whether it takes the points of such trellis codes for sums of two tables, which it looks up many at a time.
EXPORT int64_t llava_fa_linear_adds(int64_t level, const uint16_t* codebook, int64_t code_bits, int64_t state_bits) try {
  const LinearKernels* kernels = linear_kernels(level);
  return kernels->int8 && windows_of(kernels, codebook, code_bits, state_bits)->added;
} catch (const std::bad_alloc&) {
  return 0;
}

// out [batch, m] = x [batch, n] through a packed layer; see the members of Call. Columns go by at most 512 at a time.
EXPORT int64_t llava_fa_linear(int64_t level, int64_t threads, Parallel parallel, const char* x, int64_t kind,
                               int64_t batch, char* out, const uint8_t* codes, const uint16_t* row_scale,
                               const uint16_t* input_scale, const uint8_t* signs, const uint16_t* codebook,
                               const char* left, const char* right, const uint16_t* left_scale,
                               const uint16_t* right_scale, int64_t rank, const char* bias, int64_t bias_kind, int64_t m,
                               int64_t n, int64_t code_bits, int64_t state_bits, int64_t exact) try {
  const LinearKernels* kernels = linear_kernels(level);
  const int64_t size = n + n % 2, count = size / 2;
  const std::shared_ptr<const Dft> dft = plan_of(kernels, size);
  alignas(64) uint8_t tables[TABLES];
  std::shared_ptr<const Windows> windows;
  Call call{};
  call.kernels = kernels;
  call.dft = dft.get();
  call.kind = kind;
  call.row_scale = row_scale;
  call.input_scale = input_scale;
  call.signs = signs;
  call.left = left;
  call.right = right;
  call.left_scale = left_scale;
  call.right_scale = right_scale;
  call.rank = rank;
  call.factor_kind = left_scale ? 3 : 0;
  call.bias = bias;
  call.bias_kind = bias_kind;
  call.m = m;
  call.n = n;
  call.exact = exact || !kernels->int8;
  call.step = 1;
  Linear& job = call.job;
  job.codes = codes;
  job.blocks = (m + ROWS - 1) / ROWS;
  job.units = (count + UNIT - 1) / UNIT;
  job.groups = (job.units + GROUP - 1) / GROUP;
  job.code_bits = code_bits;
  job.state_bits = state_bits;
  job.words = trellis_words(count, code_bits, state_bits);
  job.tables = tables;
  if (state_bits && call.exact) {
    job.tables = reinterpret_cast<const uint8_t*>(codebook);
  } else if (state_bits) {
    windows = windows_of(kernels, codebook, code_bits, state_bits);
    call.step = windows->step;
    job.tables = windows->tables.data();
    job.addends = windows->added ? windows->parts : nullptr;
  } else if (call.exact) {
    const size_t bytes = size_t{4} << code_bits;
    for (size_t at = 0; at < 64 || at < bytes; at += bytes) std::memcpy(tables + at, codebook, bytes);
  } else {
    call.step = kernels->tables(codebook, code_bits, tables);
    job.quadrant = code_bits == 8 && is_quadrant(codebook);
  }
  const int64_t element = kind == 2 ? 4 : 2;
  for (int64_t first = 0; first < batch; first += 512) {
    call.x = x + first * n * element;
    call.out = out + first * m * element;
    call.batch = job.batch = batch - first < 512 ? batch - first : 512;
    call.next = call.done = call.arrived = 0;
    if (run(call, threads, parallel)) return 1;
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
