// Memory for packed weights: in large pages where the system has them, since a product of one row does little but walk
// through its weight. Measured: a core that reads 17 GB/s through pages of 4 KiB reads 30 through those of 2 MiB.
#include <stdlib.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "elision.h"

namespace {

constexpr size_t PAGE = size_t{2} << 20, CHUNK = size_t{32} << 20, LINE = 4096;

// Weights share a chunk, one behind the other; it goes when the last of them does. Pages that nobody wrote to cost none.
struct Chunk {
  char* data;
  size_t bytes, used, weights;
};

struct Chunks {
  std::mutex guard;
  std::map<void*, Chunk*> of;  // by weight
  Chunk* open = nullptr;       // has room
};
Chunks& chunks() {
  static Chunks* all = new Chunks;  // weights may outlive main
  return *all;
}

char* reserve(size_t bytes) {
#if defined(__linux__)
  // What is in front of the first large page and behind the last goes back.
  void* found = mmap(nullptr, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return nullptr;
  char* const first = static_cast<char*>(found);
  const size_t before = (PAGE - reinterpret_cast<uintptr_t>(first) % PAGE) % PAGE;
  if (before > 0) munmap(first, before);
  if (PAGE > before) munmap(first + before + bytes, PAGE - before);
#if defined(MADV_HUGEPAGE)
  madvise(first + before, bytes, MADV_HUGEPAGE);
#endif
  return first + before;
#else
  return static_cast<char*>(aligned_alloc(LINE, bytes));
#endif
}

void give_back(Chunk* chunk) {
#if defined(__linux__)
  munmap(chunk->data, chunk->bytes);
#else
  free(chunk->data);
#endif
  delete chunk;
}

}  // namespace

extern "C" {

void* elision_weight_memory(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  bytes = (std::max<size_t>(bytes, 1) + LINE - 1) / LINE * LINE;
  Chunks& all = chunks();
  std::lock_guard<std::mutex> lock(all.guard);
  try {
    Chunk* chunk = all.open;
    if (chunk == nullptr || chunk->bytes - chunk->used < bytes) {
      const size_t size = (std::max(bytes, CHUNK) + PAGE - 1) / PAGE * PAGE;
      char* data = reserve(size);
      if (data == nullptr) return nullptr;
      chunk = new Chunk{data, size, 0, 0};
      if (size - bytes >= PAGE) {
        if (all.open != nullptr && all.open->weights == 0) give_back(all.open);
        all.open = chunk;
      }
    }
    void* at = chunk->data + chunk->used;
    all.of.emplace(at, chunk);
    chunk->used += bytes, ++chunk->weights;
    return at;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void elision_free_weight(void* memory) {
  Chunks& all = chunks();
  std::lock_guard<std::mutex> lock(all.guard);
  const auto found = all.of.find(memory);
  if (found == all.of.end()) return;
  Chunk* chunk = found->second;
  all.of.erase(found);
  if (--chunk->weights > 0) return;
  if (all.open == chunk) all.open = nullptr;
  give_back(chunk);
}
}
