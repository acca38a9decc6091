// The blocks of a partition, shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>

#include "buffer.h"
#include "partition.h"

namespace sparse_engine {

// Runs `work` on up to `workers` threads at once, and returns when all calls have returned.
using ParallelFor = std::function<void(int workers, const std::function<void()>& work)>;

// Calls run(block, scratch) for every block of a partition, on up to `threads` threads.
template <class Run>
void run_blocks(const Partition& partition, size_t scratch_bytes, int threads, const ParallelFor& parallel_for,
                const Run& run) {
  std::atomic<size_t> next{0};
  const std::function<void()> work = [&] {
    const Scratch scratch(scratch_bytes);
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < partition.size();) {
      run(partition.block(i), scratch.data());
    }
  };
  const int workers = int(std::min(partition.size(), size_t(std::max(1, threads))));
  if (workers == 1) {
    work();
  } else {
    parallel_for(workers, work);
  }
}

}  // namespace sparse_engine
