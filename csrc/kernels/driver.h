// What the drivers of the kernels share: checks, and tasks with memory of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "kernels/parallel.h"

namespace pidiff {

inline void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// Floats on a cache line of their own. Not by aligned_alloc: glibc before 2.38 does not take what that gave back (its bug 14581), and
// a process would grow by every call.
class Scratch {
 public:
  explicit Scratch(std::int64_t floats)
      : memory_(std::malloc(static_cast<std::size_t>(std::max<std::int64_t>(floats, 1)) * sizeof(float) + kLine), &std::free) {
    if (!memory_) throw std::bad_alloc();
  }
  float* get() const {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    return reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
  }

 private:
  static constexpr std::size_t kLine = 64;
  std::unique_ptr<void, decltype(&std::free)> memory_;
};

// Runs `task(index, scratch)`; tasks may not throw, so scratch that cannot be had is reported after the loop.
template <class Task>
void run_tasks(const Parallel& pool, std::int64_t count, std::int64_t scratch_floats, const Task& task) {
  bool exhausted = false;
  parallel_for(pool, static_cast<std::size_t>(count), [&](std::size_t index) {
    try {
      task(static_cast<std::int64_t>(index), Scratch(scratch_floats).get());
    } catch (const std::bad_alloc&) {
      exhausted = true;  // only ever set, so the race is harmless
    }
  });
  if (exhausted) throw std::bad_alloc();
}

}  // namespace pidiff
