// One packed layer times a batch of vectors: plans kept, the threads and the epilogue.

#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "dft.h"
#include "part.h"
#include "threads.h"

using namespace llava_fa;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::shared_ptr<const Dft> plan_of(const LinearKernels* kernels, int64_t size) {
  static std::mutex guard;
  static std::map<std::pair<const LinearKernels*, int64_t>, std::shared_ptr<const Dft>> plans;
  const std::lock_guard<std::mutex> lock(guard);
  auto& plan = plans[{kernels, size}];
  if (!plan) plan = kernels->plan(size);
  return plan;
}

float bf16(const uint16_t* p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Linear::level of points, rounded to multiples of step: 2 level r² < 2^30 with the length r of the longest, in steps.
int32_t level_of(const uint16_t* codebook, int64_t count, float step) {
  float most = 0;
  for (int64_t i = 0; i < count; i++) {
    const float re = bf16(codebook + 2 * i), im = bf16(codebook + 2 * i + 1);
    most = std::max(most, re * re + im * im);
  }
  const float longest = std::sqrt(most) / step + 1;  // of the rounding, √½ at most
  return static_cast<int32_t>((1 << 29) / (longest * longest)) - 1;
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
  int32_t level;
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
  made->level = level_of(codebook, int64_t{1} << state_bits, made->step);
  made->added = kernels->trellis_addends && kernels->trellis_addends(made->tables.data(), code_bits, state_bits, made->parts);
  if (kept.size() == 8) kept.erase(kept.begin());
  kept.push_back(made);
  return made;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::bf16 ? 2 : 1; }

// Some columns of a layer's input, and what the threads share while they multiply them.
struct Call {
  Layer layer;  // x, out and batch of these columns
  const LinearKernels* kernels;
  std::shared_ptr<const Dft> dft;
  bool exact;
  Dtype factor_dtype;
  Linear job{};
  float step = 1;
  int64_t batch = 0;
  // What the rows are looked up in, where that is not kept elsewhere.
  alignas(64) uint8_t tables[TABLES];
  std::shared_ptr<const Windows> windows;
  // Working memory.
  std::vector<int8_t> int8s;
  std::vector<float> floats;
  std::vector<int32_t> int32s;
  int8_t* x_int8 = nullptr;
  float *x_scale = nullptr, *x_float = nullptr, *x_wide = nullptr, *inner = nullptr;
  int32_t *x_bias = nullptr, *x_steep = nullptr;
  std::atomic<int64_t> next{0}, done{0};
  std::atomic<bool> failed{false};
  std::vector<Part> parts;  // of each thread
  int64_t threads = 1, at_once = 1;

  // Rows of R that one task takes.
  static constexpr int64_t RIGHT = 8;
  // Bytes of codes that a thread fetches while it waits: what most cores' own cache has room for.
  static constexpr int64_t AHEAD = 1 << 18;
  int64_t block_codes() const { return job.state_bits ? job.words * 64 : job.units * job.code_bits * 64; }  // bytes
  int64_t whole_groups() const { return job.groups * GROUP * UNIT; }  // coefficients
  int64_t first_tasks() const { return batch + (layer.rank + RIGHT - 1) / RIGHT; }

  void transform(int64_t column, char* scratch) {
    const int64_t half = dft->half, room = whole_groups();
    float* re = reinterpret_cast<float*>(scratch);
    float *im = re + room, *rest = im + room;
    const char* from = layer.x + column * layer.n * bytes_of(layer.dtype);
    kernels->dft(*dft, from, layer.dtype, layer.n, layer.input_scale, layer.signs, re, im, rest);
    if (!exact) {
      for (int64_t f = half; f < room; f++) re[f] = im[f] = 0;
      kernels->quantise(job, column, re, im, x_int8, x_scale, x_bias, x_steep);
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
    const int64_t rank = layer.rank, n = layer.n, last = std::min(rank, (task + 1) * RIGHT);
    for (int64_t r = task * RIGHT; r < last; r++) {
      const float scale = layer.left_scale ? bf16(layer.left_scale + r) * bf16(layer.right_scale + r) : 1.0f;
      const char* row = layer.right + r * n * bytes_of(factor_dtype);
      for (int64_t c = 0; c < batch; c++)
        inner[c * rank + r] = scale * kernels->dot(row, factor_dtype, x_wide + c * n, n);
    }
  }

  void rows(int64_t first, int64_t count, float* y, char* scratch) {
    (exact ? kernels->exact : kernels->int8)(job, first, count, y, scratch);
    const int64_t m = layer.m, rank = layer.rank;
    for (int64_t b = 0; b < count; b++) {
      const int64_t row = (first + b) * ROWS, some = std::min(ROWS, m - row);
      float scale[ROWS] = {}, added[ROWS] = {};
      for (int64_t i = 0; i < some; i++) scale[i] = bf16(layer.row_scale + row + i) * step;
      if (layer.bias) kernels->widen(layer.bias + row * bytes_of(layer.bias_dtype), layer.bias_dtype, some, added);
      for (int64_t c = 0; c < batch; c++) {
        float low_rank[ROWS] = {};
        for (int64_t i = 0; rank && i < some; i++)
          low_rank[i] = kernels->dot(layer.left + (row + i) * rank * bytes_of(factor_dtype), factor_dtype, inner + c * rank, rank);
        kernels->finish(y + (b * batch + c) * ROWS, scale, rank ? low_rank : nullptr, added, some,
                        layer.out + (c * m + row) * bytes_of(layer.dtype), layer.dtype);
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

  // Transforms and the small product: what every thread does first.
  void first() try {
    char* scratch = workspace((2 * static_cast<size_t>(whole_groups()) + kernels->dft_scratch(*dft)) * sizeof(float));
    const int64_t tasks = first_tasks();
    for (int64_t task; (task = next.fetch_add(1)) < tasks; done.fetch_add(1)) {
      if (task < batch)
        transform(task, scratch);
      else
        times_right(task - batch);
    }
  } catch (const std::bad_alloc&) {
    failed = true;
  }

  // Blocks of rows, when all threads have done those.
  void then(int64_t thread) try {
    const size_t y_bytes = static_cast<size_t>(at_once * batch * ROWS) * sizeof(float);
    char* scratch = workspace(y_bytes + kernels->scratch);
    // While another transforms x, the codes that this thread begins with come into its cache.
    auto [first, count] = take(thread);
    const uint8_t* codes = job.codes + first * block_codes();
    int64_t fetched = 0;
    const int64_t wanted = std::min(AHEAD, (count + parts[static_cast<size_t>(thread)].left()) * block_codes());
    const int64_t tasks = first_tasks();
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

  // A layer, columns first … first + count - 1 of its input.
  Call(const Layer& whole, int64_t first, int64_t count, const LinearKernels* kernels, int64_t threads)
      : layer(whole), kernels(kernels), threads(threads) {
    const int64_t size = layer.n + layer.n % 2, half = size / 2;
    layer.x += first * layer.n * bytes_of(layer.dtype);
    layer.out += first * layer.m * bytes_of(layer.dtype);
    batch = layer.batch = job.batch = count;
    dft = plan_of(kernels, size);
    factor_dtype = layer.left_scale ? Dtype::int8 : Dtype::bf16;
    exact = layer.exact || !kernels->int8;
    job.codes = layer.codes;
    job.blocks = (layer.m + ROWS - 1) / ROWS;
    job.units = (half + UNIT - 1) / UNIT;
    job.groups = (job.units + GROUP - 1) / GROUP;
    job.code_bits = layer.code_bits;
    job.state_bits = layer.state_bits;
    job.words = trellis_words(half, layer.code_bits, layer.state_bits);
    look_up();
    allocate();
    share();
  }

 private:
  // What codes are looked up in.
  void look_up() {
    job.tables = tables;
    if (layer.state_bits && exact) {
      job.tables = reinterpret_cast<const uint8_t*>(layer.codebook);
    } else if (layer.state_bits) {
      windows = windows_of(kernels, layer.codebook, layer.code_bits, layer.state_bits);
      step = windows->step;
      job.level = windows->level;
      job.tables = windows->tables.data();
      job.addends = windows->added ? windows->parts : nullptr;
    } else if (exact) {
      const size_t bytes = size_t{4} << layer.code_bits;
      for (size_t at = 0; at < 64 || at < bytes; at += bytes) std::memcpy(tables + at, layer.codebook, bytes);
    } else {
      step = kernels->tables(layer.codebook, layer.code_bits, tables);
      job.level = level_of(layer.codebook, int64_t{1} << layer.code_bits, step);
      job.quadrant = layer.code_bits == 8 && is_quadrant(layer.codebook);
    }
  }

  void allocate() {
    const size_t columns = static_cast<size_t>(batch), groups = static_cast<size_t>(job.groups);
    const size_t wide = layer.rank ? columns * static_cast<size_t>(layer.n + layer.rank) : 0;
    if (exact) {
      floats.resize(columns * static_cast<size_t>(job.units * UNIT * 2) + wide);
      x_float = floats.data();
      x_wide = floats.data() + columns * static_cast<size_t>(job.units * UNIT * 2);
    } else {
      int8s.resize(columns * groups * GROUP * UNIT / 2 * static_cast<size_t>(kernels->x_bytes) + 63);
      int32s.resize(2 * columns * groups);
      floats.resize(columns * groups + wide);
      x_int8 = int8s.data() + (64 - reinterpret_cast<uintptr_t>(int8s.data()) % 64) % 64;  // a tile's row in one line
      x_bias = int32s.data();
      x_steep = x_bias + columns * groups;
      x_scale = floats.data();
      x_wide = floats.data() + columns * groups;
    }
    if (layer.rank) {
      inner = x_wide + columns * static_cast<size_t>(layer.n);
      kernels->widen(layer.x, layer.dtype, batch * layer.n, x_wide);
    }
    job.x = x_int8;
    job.x_scale = x_scale;
    job.x_bias = x_bias;
    job.x_steep = x_steep;
    job.x_float = x_float;
  }

  // Blocks at a time: few enough that all threads have some, and about 64 KB of codes for a thread to read on in.
  void share() {
    const int64_t bytes = block_codes();
    at_once = bytes > 1 << 16 ? 1 : (1 << 16) / bytes;
    if (batch > 1 && at_once < 4) at_once = 4;  // where points are kept, x goes through the cache once for all of them
    if (at_once > 16) at_once = 16;
    while (at_once > 1 && at_once * 4 * threads > job.blocks) at_once /= 2;
    parts = std::vector<Part>(static_cast<size_t>(threads));
    for (int64_t i = 0; i < threads; i++)
      parts[static_cast<size_t>(i)].set(static_cast<uint32_t>(job.blocks * i / threads),
                                        static_cast<uint32_t>(job.blocks * (i + 1) / threads));
  }
};

// Columns that are multiplied at a time, of one layer or of several: working memory is made for so many.
constexpr int64_t COLUMNS = 512;

// All calls' transforms, then all calls' rows: no thread waits for another but between the two.
bool run(std::vector<std::unique_ptr<Call>>& calls, int64_t threads, Parallel parallel) {
  std::atomic<int64_t> arrived{0};
  auto body = [&] {
    const int64_t thread = arrived.fetch_add(1);
    for (auto& call : calls) call->first();
    for (auto& call : calls) call->then(thread);
  };
  on_threads(threads, parallel, body);
  return std::none_of(calls.begin(), calls.end(), [](const auto& call) { return call->failed.load(); });
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

// out = x through each of `count` packed layers, which share nothing but the threads.
EXPORT int64_t llava_fa_linear(int64_t level, int64_t threads, Parallel parallel, const Layer* layers, int64_t count) try {
  const LinearKernels* kernels = linear_kernels(level);
  threads = std::max<int64_t>(threads, 1);
  std::vector<std::unique_ptr<Call>> calls;
  int64_t columns = 0;
  for (const Layer* layer = layers; layer < layers + count; layer++)
    for (int64_t first = 0; first < layer->batch;) {
      const int64_t some = std::min(COLUMNS - columns, layer->batch - first);
      calls.push_back(std::make_unique<Call>(*layer, first, some, kernels, threads));
      first += some;
      columns += some;
      if (columns < COLUMNS) continue;
      if (!run(calls, threads, parallel)) return 1;
      calls.clear();
      columns = 0;
    }
  return calls.empty() || run(calls, threads, parallel) ? 0 : 1;
} catch (const std::bad_alloc&) {
  return 1;
}
