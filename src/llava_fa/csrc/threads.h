// The threads of one call, and what each of them keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace llava_fa {

// GOMP_parallel of the OpenMP runtime that torch runs on, so that its threads are ours: no second pool beside it.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// body() on so many threads, this one among them: those of `parallel`, or, where that is null, threads of this call
// alone, so that fork is safe.
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

// Working memory that a thread keeps from call to call: the largest it ever needed, aligned to 64 bytes.
inline char* workspace(size_t bytes) {
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

// What a thread that waits does, so that one that shares its core runs at full speed.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace llava_fa
