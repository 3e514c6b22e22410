// Scratch memory, sorting, sentences.
#include "common.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <new>

namespace elision {

namespace {

constexpr std::align_val_t LINE{64};

struct Kept {
  void* data = nullptr;
  size_t bytes = 0;
  bool lent = false;
};
struct Memory {
  Kept kept[SCRATCHES];
  ~Memory() {
    for (Kept& one : kept) ::operator delete(one.data, LINE);
  }
};
thread_local Memory memory;

}  // namespace

Scratch::Scratch(int slot, size_t bytes) : data_(nullptr), slot_(slot) {
  bytes = std::max<size_t>(bytes, 64);
  Kept& own = memory.kept[slot];
  if (own.lent) {
    slot_ = -1;
    data_ = ::operator new(bytes, LINE, std::nothrow);
    return;
  }
  if (own.bytes < bytes) {
    ::operator delete(own.data, LINE);
    own.data = ::operator new(bytes, LINE, std::nothrow);
    own.bytes = own.data == nullptr ? 0 : bytes;
  }
  own.lent = own.data != nullptr;
  data_ = own.data;
  if (data_ == nullptr) slot_ = -1;
}

Scratch::~Scratch() {
  if (slot_ >= 0)
    memory.kept[slot_].lent = false;
  else
    ::operator delete(data_, LINE);
}

int fail(char* error, size_t room, const char* format, ...) {
  va_list values;
  va_start(values, format);
  if (error != nullptr && room > 0) vsnprintf(error, room, format, values);
  va_end(values);
  return 1;
}

void sort_keys(uint64_t* keys, size_t count) { std::sort(keys, keys + count); }

bool product(int64_t* out, const int64_t* lengths, int count) {
  int64_t total = 1;
  for (int i = 0; i < count; ++i) {
    if (lengths[i] < 0 || __builtin_mul_overflow(total, lengths[i], &total)) return false;
  }
  *out = total;
  return true;
}

int explain(const Trouble& trouble, const char* op, char* error, size_t room) {
  switch (trouble.code.load()) {
    case 0: return 0;
    case TROUBLE_MEMORY: return fail(error, room, "%s: out of memory", op);
    case TROUBLE_SLOT: return fail(error, room, "%s: the map is inconsistent, a slot is out of range", op);
    case TROUBLE_KEEP: return fail(error, room, "%s: the map is inconsistent, a kept token is out of range", op);
    default: return fail(error, room, "%s: the map is inconsistent, a source is out of range", op);
  }
}

}  // namespace elision
