// Work that threads take from a shared queue, one item at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>

#include "buffer.h"

namespace sparse_engine {

// Runs `work` on up to `workers` threads at once, and returns when all calls have returned.
using ParallelFor = std::function<void(int workers, const std::function<void()>& work)>;

// Calls run(item, scratch) for each of `items`, on up to `threads` threads. Whichever thread is free takes the next, so
// what an item computes must not depend on the others.
template <class Run>
void for_each_item(size_t items, size_t scratch_bytes, int threads, const ParallelFor& parallel_for, const Run& run) {
  std::atomic<size_t> next{0};
  const std::function<void()> work = [&] {
    const Scratch scratch(scratch_bytes);
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(i, scratch.data());
  };
  const int workers = int(std::min(items, size_t(std::max(1, threads))));
  if (workers == 1) {
    work();
  } else {
    parallel_for(workers, work);
  }
}

}  // namespace sparse_engine
