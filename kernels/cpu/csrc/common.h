// What the kernels of every variant share: scratch memory, errors, running tasks. No SIMD here: one copy serves all.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <atomic>

#include "elision.h"

namespace elision {

// Memory on loan from the calling thread, which keeps it for its next call: nothing is allocated once a thread has
// seen the largest shapes. `slot` tells scratches apart that are in use together; one that is on loan already (a
// host that runs a second call inside a first) is allocated for the while. 64-byte aligned.
class Scratch {
 public:
  Scratch(int slot, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }  // null when there is no memory to be had

 private:
  void* data_;
  int slot_;  // -1: not the thread's own
};

// A sentence for the caller; returns 1.
int fail(char* error, size_t room, const char* format, ...);

// Ascending, in place.
void sort_keys(uint64_t* keys, size_t count);

// Product of non-negative lengths; false when one is negative or the product overflows.
bool product(int64_t* out, const int64_t* lengths, int count);

struct PackedHeader;
struct Kernels {
  const char* name;
  int (*match)(const elision_match_args&, const elision_runner&, char*, size_t);
  int (*mean)(const elision_mean_args&, const elision_runner&, char*, size_t);
  int (*merge)(const elision_merge_args&, const elision_runner&, char*, size_t);
  int (*restore)(const elision_restore_args&, const elision_runner&, char*, size_t);
  int (*attention)(const elision_attention_args&, const elision_runner&, char*, size_t);
  int (*linear)(const elision_linear_args&, const PackedHeader&, const elision_runner&, char*, size_t);
  int (*cached)(const elision_cached_args&, const elision_runner&, char*, size_t);
  int (*gated)(const elision_gated_args&, const elision_runner&, char*, size_t);
  int (*norm)(const elision_norm_args&, const elision_runner&, char*, size_t);
};

// Scratch slots.
enum { CALL_FLOATS, CALL_INDICES, CALL_SUMS, TASK_FLOATS, SCRATCHES };

// What the first failing task of a call says. Tasks only set it; the caller reads it when all are done.
struct Trouble {
  std::atomic<int> code{0};
  void report(int found) {
    int none = 0;
    code.compare_exchange_strong(none, found);
  }
};
enum { TROUBLE_MEMORY = 1, TROUBLE_SLOT, TROUBLE_KEEP, TROUBLE_SOURCE };
int explain(const Trouble& trouble, const char* op, char* error, size_t room);

}  // namespace elision
