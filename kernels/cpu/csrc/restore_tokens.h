// restore_tokens: back to all tokens, each with the row of its slot. Rows are copied as bytes, whatever they hold.
#pragma once
#include "merge_tokens.h"

namespace elision {
namespace ELISION_VARIANT {

struct Restore {
  const elision_restore_args& args;
  Trouble trouble;
  Strides from, to;
  int64_t chunk, chunks;

  // Short rows are common (one number a token); a memcpy of unknown length would cost more than it moves.
  ELISION_INLINE void copy(char* out, const char* in, size_t bytes) const {
    if (bytes == 4)
      memcpy(out, in, 4);
    else
      memcpy(out, in, bytes);
  }

  void tokens(int64_t sample, int64_t first) {
    const int64_t item = args.itemsize, count = args.count, left = args.left;
    const int32_t* slot = args.slot + (args.map_batch == 1 ? 0 : sample * count);
    const int64_t until = smaller(count, first + chunk);
    const size_t bytes = static_cast<size_t>(args.layout.width * item);
    for (int64_t i = first; i < until; ++i)
      if (slot[i] < -1 || slot[i] >= left) return trouble.report(TROUBLE_SLOT);
    if (bytes == 0) return;
    for (int64_t p = 0; p < args.layout.pre; ++p) {
      for (int64_t m = 0; m < args.layout.mid; ++m) {
        const char* y = static_cast<const char*>(args.y) + (p * from.pre + sample * from.sample + m * from.mid) * item;
        char* x = static_cast<char*>(args.x) + (p * to.pre + sample * to.sample + m * to.mid) * item;
        for (int64_t i = first; i < until; ++i) {
          char* out = x + i * to.token * item;
          if (slot[i] < 0)
            memset(out, 0, bytes);
          else
            copy(out, y + slot[i] * from.token * item, bytes);
        }
      }
    }
  }
};

inline int restore(const elision_restore_args& args, const elision_runner& runner, char* error, size_t room) {
  const Strides from(args.layout, args.y_batch, args.left, args.batch);
  const Strides to(args.layout, args.batch, args.count, args.batch);
  const int64_t row_bytes = larger<int64_t>(1, args.layout.pre * args.layout.mid * args.layout.width * args.itemsize);
  const int64_t chunk = larger<int64_t>(1, smaller<int64_t>(args.count, BYTES_PER_TASK / row_bytes));
  Restore restore{args, {}, from, to, chunk, (args.count + chunk - 1) / chunk};
  const auto task = [](void* self, size_t i) {
    Restore* r = static_cast<Restore*>(self);
    r->tokens(static_cast<int64_t>(i) / r->chunks, static_cast<int64_t>(i) % r->chunks * r->chunk);
  };
  runner.run(runner.self, task, &restore, static_cast<size_t>(args.batch * restore.chunks));
  return explain(restore.trouble, "restore_tokens", error, room);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
