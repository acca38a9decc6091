// Aligned memory: packed weights, and scratch that threads borrow.
#pragma once

#include <cstddef>

namespace sparse_engine {

// Memory aligned to a page, so that large ones do not share pages. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Tells the system that memory will hardly be read again: pages that are mapped from a file leave memory, and come back
// from the file if they are. Nothing is lost, whatever kind of memory it is; where the system cannot, nothing happens.
void page_out(const void* data, size_t bytes);

// Scratch for the length of one block. All kernels of the process share the idle ones, so that a network of
// fifty layers holds one per thread and not fifty; nothing is bound to a thread that belongs to somebody
// else.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return buffer_.data(); }

 private:
  Buffer buffer_;
};

}  // namespace sparse_engine
