#include "buffer.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace sparse_engine {
namespace {

constexpr size_t kAlignment = 4096;

struct IdleScratch {
  std::mutex mutex;
  std::vector<Buffer> buffers;
};

IdleScratch& idle_scratch() {
  static IdleScratch idle;
  return idle;
}

}  // namespace

Buffer::Buffer(size_t bytes) : size_((std::max(bytes, size_t(1)) + kAlignment - 1) / kAlignment * kAlignment) {
  data_ = std::aligned_alloc(kAlignment, size_);
  if (!data_) throw std::bad_alloc();
}

Buffer::~Buffer() { std::free(data_); }

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void page_out(const void* data, size_t bytes) {
#ifdef MADV_PAGEOUT
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kAlignment - 1) / kAlignment * kAlignment;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kAlignment * kAlignment;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_PAGEOUT);
#else
  (void)data, (void)bytes;
#endif
}

Scratch::Scratch(size_t bytes) {
  if (bytes == 0) return;
  IdleScratch& idle = idle_scratch();
  {
    const std::lock_guard<std::mutex> lock(idle.mutex);
    if (!idle.buffers.empty()) {
      buffer_ = std::move(idle.buffers.back());
      idle.buffers.pop_back();
    }
  }
  if (buffer_.size() < bytes) buffer_ = Buffer(bytes);
}

Scratch::~Scratch() {
  if (!buffer_.data()) return;
  IdleScratch& idle = idle_scratch();
  const std::lock_guard<std::mutex> lock(idle.mutex);
  idle.buffers.push_back(std::move(buffer_));
}

}  // namespace sparse_engine
