// Where the CPU kernels get their threads from: the host's own pool (ONNX Runtime lends one) or ours.
#pragma once

#include <cstddef>
#include <type_traits>

namespace pidiff {

// Runs task(user, i) for every i in [0, count), in any order, and returns when all are done. Tasks must not throw.
struct Parallel {
  using Task = void (*)(void* user, std::size_t index);
  void (*run)(void* context, std::size_t count, Task task, void* user) = nullptr;
  void* context = nullptr;
};

// Our own pool, started on first use. Threads: PIDIFF_NUM_THREADS, else OMP_NUM_THREADS, else the processors this
// process may use. Safe after fork. A call from within a task, or from a second thread meanwhile, runs on its caller.
// `limit`: how many of them at most, 0 for all.
Parallel own_threads(int limit = 0);

// Starts the pool; returns its threads, the caller among them. From a thread that is bound to one processor it would have one.
int start_threads();

// All on the calling thread.
Parallel no_threads();

// parallel_for(pool, n, [&](std::size_t i) { ... })
template <class Function>
void parallel_for(const Parallel& pool, std::size_t count, Function&& function) {
  using Plain = typename std::remove_reference<Function>::type;
  pool.run(
      pool.context, count, [](void* user, std::size_t index) { (*static_cast<Plain*>(user))(index); },
      const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace pidiff
