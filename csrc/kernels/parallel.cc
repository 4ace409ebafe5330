#include "kernels/parallel.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pidiff {
namespace {

int thread_count() {
  for (const char* name : {"PIDIFF_NUM_THREADS", "OMP_NUM_THREADS"}) {
    if (const char* text = std::getenv(name)) {
      const int value = std::atoi(text);
      if (value > 0) return value < 256 ? value : 256;
    }
  }
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
}

class Pool {
 public:
  explicit Pool(int threads) : owner_(getpid()) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  pid_t owner() const { return owner_; }
  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(int limit, std::size_t count, Parallel::Task task, void* user) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock() || workers_.empty() || count < 2 || limit == 1) {
      for (std::size_t i = 0; i < count; ++i) task(user, i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = task;
      user_ = user;
      count_ = count;
      limit_ = limit == 0 ? threads() : limit;
      next_.store(0, std::memory_order_relaxed);
      busy_ = workers_.size();
      ++round_;
    }
    wake_.notify_all();
    drain(task, user, count);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void drain(Parallel::Task task, void* user, std::size_t count) {
    for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(user, i);
  }

  void work(int index) {
    std::size_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      const auto task = task_;
      const auto user = user_;
      const auto count = index < limit_ ? count_ : 0;
      lock.unlock();
      drain(task, user, count);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const pid_t owner_;
  std::mutex turn_;   // one parallel region at a time
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  Parallel::Task task_ = nullptr;
  void* user_ = nullptr;
  std::size_t count_ = 0, round_ = 0, busy_ = 0;
  int limit_ = 0;
  std::atomic<std::size_t> next_{0};
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

thread_local bool inside_task = false;

Pool& pool() {
  static std::mutex guard;
  static Pool* instance = nullptr;  // never freed: worker threads may outlive static destruction otherwise
  std::lock_guard<std::mutex> lock(guard);
  // fork() copies the object but not its threads: the child leaks the copy and starts its own pool.
  if (instance == nullptr || instance->owner() != getpid()) instance = new Pool(thread_count());
  return *instance;
}

void run_serial(void*, std::size_t count, Parallel::Task task, void* user) {
  for (std::size_t i = 0; i < count; ++i) task(user, i);
}

struct Guarded {
  Parallel::Task task;
  void* user;
};

void run_own(void* limit, std::size_t count, Parallel::Task task, void* user) {
  if (inside_task || count < 2) return run_serial(nullptr, count, task, user);
  Guarded guarded{task, user};
  pool().run(
      static_cast<int>(reinterpret_cast<std::intptr_t>(limit)), count,
      [](void* data, std::size_t index) {
        const auto& inner = *static_cast<Guarded*>(data);
        inside_task = true;
        inner.task(inner.user, index);
        inside_task = false;
      },
      &guarded);
}

}  // namespace

Parallel own_threads(int limit) { return {run_own, reinterpret_cast<void*>(static_cast<std::intptr_t>(limit))}; }
int start_threads() { return pool().threads(); }
Parallel no_threads() { return {run_serial, nullptr}; }

}  // namespace pidiff
