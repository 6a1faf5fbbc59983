// Codes as stored (docs/format.md) ↔ in the order of the kernels (kernels/interleaved.py).

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "linear.h"
#include "threads.h"

using namespace llava_fa;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Blocks that a thread takes at a time.
constexpr int64_t CHUNK = 8;

constexpr uint64_t low_bits(int count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Numbers of 64 bits that hold the pattern once every so many bits.
constexpr uint64_t repeat(uint64_t pattern, int every) {
  uint64_t all = 0;
  for (int at = 0; at < 64; at += every) all |= pattern << at;
  return all;
}

// A number of B bytes, put together in a register: a wide load of what was stored in pieces would have to wait for them.
template <int B>
inline uint64_t bytes(const uint8_t* from) {
  if constexpr (B == 8) {
    uint64_t x;
    std::memcpy(&x, from, 8);
    return x;
  } else if constexpr (B >= 4) {
    uint32_t x;
    std::memcpy(&x, from, 4);
    return x | bytes<B - 4>(from + 4) << 32;
  } else if constexpr (B >= 2) {
    uint16_t x;
    std::memcpy(&x, from, 2);
    return x | bytes<B - 2>(from + 2) << 16;
  } else {
    return B ? *from : 0;
  }
}

// Eight codes of B bits ↔ a byte each: halves are moved apart, then quarters, then single codes.
template <int B>
inline uint64_t apart(uint64_t x) {
  x = (x & low_bits(4 * B)) | (x >> (4 * B) & low_bits(4 * B)) << 32;
  x = (x & repeat(low_bits(2 * B), 32)) | (x & repeat(low_bits(2 * B) << 2 * B, 32)) << (16 - 2 * B);
  return (x & repeat(low_bits(B), 16)) | (x & repeat(low_bits(B) << B, 16)) << (8 - B);
}

template <int B>
inline uint64_t together(uint64_t x) {
  x = (x & repeat(low_bits(B), 16)) | (x >> (8 - B) & repeat(low_bits(B) << B, 16));
  x = (x & repeat(low_bits(2 * B), 32)) | (x >> (16 - 2 * B) & repeat(low_bits(2 * B) << 2 * B, 32));
  return (x & low_bits(4 * B)) | (x >> (32 - 4 * B) & low_bits(4 * B) << 4 * B);
}

template <int N>
using Constant = std::integral_constant<int, N>;

// A unit of one row: 4 B bytes as stored ↔ a dword in each of B vectors. `eight[e]` are the codes c_2e and c_2e+1.
template <int B>
struct Rings {
  static constexpr int bits = B;

  // Fields of 8, 4, 2 and 1 bits, of as many vectors, from the low bits of a code on. What is known when compiled is a type.
  template <int WIDTH = 8, int LOW = 0, int VECTOR = 0, class F>
  static inline __attribute__((always_inline)) void over_fields(F f) {
    if constexpr (WIDTH == 8 ? B == 8 : B != 8 && (B & WIDTH)) {
#pragma GCC unroll 8
      for (int i = 0; i < WIDTH; i++) f(Constant<WIDTH>{}, Constant<LOW>{}, i, VECTOR + i);
      over_fields<WIDTH / 2, LOW + WIDTH, VECTOR + WIDTH>(f);
    } else if constexpr (WIDTH > 0) {
      over_fields<WIDTH / 2, LOW, VECTOR>(f);
    }
  }

  static inline __attribute__((always_inline)) void forth(const uint8_t* stored, uint32_t* vectors) {
    uint64_t eight[4];
    for (int e = 0; e < 4; e++) eight[e] = apart<B>(bytes<B>(stored + e * B));
    over_fields([&](auto width, auto low, int i, int vector) __attribute__((always_inline)) {
      if constexpr (width == 8) {
        vectors[vector] = static_cast<uint32_t>(eight[i / 2] >> i % 2 * 32);
      } else {
        constexpr uint64_t mask = repeat(low_bits(width), 8);
        uint64_t pairs = 0;
        for (int k = 0; k < 4 / width; k++) pairs |= (eight[i * (4 / width) + k] >> low & mask) << 2 * width * k;
        vectors[vector] = static_cast<uint32_t>(pairs | pairs >> 32 << width);
      }
    });
  }

  static inline __attribute__((always_inline)) void back(const uint32_t* vectors, uint8_t* stored) {
    uint64_t eight[4] = {};
    over_fields([&](auto width, auto low, int i, int vector) __attribute__((always_inline)) {
      if constexpr (width == 8) {
        eight[i / 2] |= uint64_t{vectors[vector]} << i % 2 * 32;
      } else {
        constexpr uint64_t mask = repeat(low_bits(width), 8);
        const uint64_t pairs = vectors[vector] | uint64_t{vectors[vector]} >> width << 32;
        for (int k = 0; k < 4 / width; k++) eight[i * (4 / width) + k] |= (pairs >> 2 * width * k & mask) << low;
      }
    });
    for (int e = 0; e < 4; e++) {
      const uint64_t bits = together<B>(eight[e]);
      std::memcpy(stored + e * B, &bits, B);
    }
  }
};

template <int B>
struct Trellis {
  static constexpr int bits = B;

  static void forth(const uint8_t* stored, uint32_t* vectors) {
    uint16_t words[2 * B];
    std::memcpy(words, stored, sizeof words);
    for (int i = 0; i < B; i++) vectors[i] = words[i] | uint32_t{words[B + i]} << 16;
  }

  static void back(const uint32_t* vectors, uint8_t* stored) {
    uint16_t words[2 * B];
    for (int i = 0; i < B; i++) {
      words[i] = static_cast<uint16_t>(vectors[i]);
      words[B + i] = static_cast<uint16_t>(vectors[i] >> 16);
    }
    std::memcpy(stored, words, sizeof words);
  }
};

struct Sizes {
  int64_t row_bytes, vectors;  // of a row as stored; of a block
};

template <class Unit>
void forth(const Interleave& job, const Sizes& size, int64_t block) {
  const int64_t first = block * ROWS, rows = std::min(ROWS, job.m - first);
  uint8_t* to = job.to + block * size.vectors * 64;
  for (int64_t v = 0; v < size.vectors; v += Unit::bits, to += 64 * Unit::bits) {
    const int64_t count = std::min<int64_t>(Unit::bits, size.vectors - v), left = size.row_bytes - 4 * v;
    const bool whole = left >= 4 * Unit::bits && count == Unit::bits;
    const uint8_t* from = job.source + first * size.row_bytes + 4 * v;
    if (rows < ROWS) std::memset(to, 0, 64 * count);
    for (int64_t row = 0; row < rows; row++, from += size.row_bytes) {
      uint32_t dwords[Unit::bits];
      if (whole) {
        Unit::forth(from, dwords);
        for (int i = 0; i < Unit::bits; i++) std::memcpy(to + 64 * i + 4 * row, dwords + i, 4);
        continue;
      }
      uint8_t stored[4 * Unit::bits] = {};
      if (left > 0) std::memcpy(stored, from, static_cast<size_t>(std::min<int64_t>(left, sizeof stored)));
      Unit::forth(stored, dwords);
      for (int i = 0; i < count; i++) std::memcpy(to + 64 * i + 4 * row, dwords + i, 4);
    }
  }
}

template <class Unit>
void back(const Interleave& job, const Sizes& size, int64_t block) {
  const int64_t first = block * ROWS, rows = std::min(ROWS, job.m - first);
  const uint8_t* from = job.source + block * size.vectors * 64;
  for (int64_t v = 0; v < size.vectors; v += Unit::bits, from += 64 * Unit::bits) {
    const int64_t count = std::min<int64_t>(Unit::bits, size.vectors - v), left = size.row_bytes - 4 * v;
    uint8_t* to = job.to + first * size.row_bytes + 4 * v;
    if (left <= 0) break;
    for (int64_t row = 0; row < rows; row++, to += size.row_bytes) {
      uint32_t dwords[Unit::bits] = {};
      uint8_t stored[4 * Unit::bits];
      for (int i = 0; i < count; i++) std::memcpy(dwords + i, from + 64 * i + 4 * row, 4);
      Unit::back(dwords, stored);
      std::memcpy(to, stored, static_cast<size_t>(std::min<int64_t>(left, sizeof stored)));
    }
  }
}

// Shifts and masks are known when compiled: they are most of the work.
template <template <int> class Unit, int B>
void over_blocks(const Interleave& job, const Sizes& size, int64_t threads, Parallel parallel) {
  if constexpr (B <= 8) {
    if (B != job.code_bits) return over_blocks<Unit, B + 1>(job, size, threads, parallel);
    const int64_t blocks = (job.m + ROWS - 1) / ROWS, chunks = (blocks + CHUNK - 1) / CHUNK;
    std::atomic<int64_t> next{0};
    auto work = [&] {
      for (int64_t first; (first = next.fetch_add(CHUNK)) < blocks;)
        for (int64_t block = first; block < std::min(first + CHUNK, blocks); block++)
          job.back ? back<Unit<B>>(job, size, block) : forth<Unit<B>>(job, size, block);
    };
    on_threads(std::min(threads, chunks), parallel, work);
  }
}

}  // namespace

// source → to, every byte of it. parallel: GOMP_parallel, or null.
EXPORT void llava_fa_interleave(int64_t threads, Parallel parallel, const Interleave* job) {
  const int64_t b = job->code_bits, bits = job->coefficients * b + (job->state_bits ? job->state_bits - b : 0);
  const int64_t words = trellis_words(job->coefficients, b, job->state_bits);
  const Sizes size{(bits + 7) / 8, words ? words : (job->coefficients + UNIT - 1) / UNIT * b};
  job->state_bits ? over_blocks<Trellis, 1>(*job, size, threads, parallel)
                  : over_blocks<Rings, 2>(*job, size, threads, parallel);
}
