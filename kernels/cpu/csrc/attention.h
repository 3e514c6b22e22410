// attention: softmax(q k^T * scale + log(size) + mask) v, one block of keys after another with a running maximum.
//
// Scores exist for a block of queries and keys at a time, in cache. Floor: 2 * n * m * (d + e) operations a head and
// n * m exponentials; at head width 64 the products bound it.
#pragma once
#include "common.h"
#include "dot_tile.h"

namespace elision {
namespace ELISION_VARIANT {

constexpr int64_t QUERY_CHUNK = 288;  // queries a task takes: keys are packed once for them
constexpr int64_t QUERY_BLOCK = 24;   // queries whose scores are in flight; a multiple of every tile
constexpr int64_t KEY_BLOCK = 512;
constexpr float NEVER = -3e4f;  // the logit of a key of size 0

// x[0 ... n) as elements.
ELISION_INLINE void as_elements(const float* x, int64_t n, float* out) {
  if (n > 0) memcpy(out, x, sizeof(float) * static_cast<size_t>(n));  // without elements there may be no address
}
template <class T>
ELISION_INLINE void as_elements(const T* x, int64_t n, float* out) {
  int64_t k = 0;
  for (; k + W <= n; k += W) store(out + k, load(x + k));
  if (k < n) store(out + k, load(x + k, n - k), n - k);
}

// Rows `key` and up of v, as many as an element holds, side by side; `rows` of them exist.
template <class T>
ELISION_INLINE void as_elements(const T* v, int64_t stride, int64_t rows, int64_t n, float* out) {
  if (rows > 0) as_elements(v, n, out);
  (void)stride;
}

// Weights to multiply with: floats already.
ELISION_INLINE void as_weights(const float*, int64_t, float*) {}

#if defined(__AVX512BF16__)
ELISION_INLINE void as_elements(const bf16* x, int64_t n, Pair* out) {
  if (n > 0) memcpy(out, x, sizeof(bf16) * static_cast<size_t>(n));
  if (n % 2 != 0) out[n / 2].bits &= 0xffff;
}
ELISION_INLINE void as_elements(const bf16* v, int64_t stride, int64_t rows, int64_t n, Pair* out) {
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t next = rows > 1 ? v[stride + c].bits : 0;
    out[c].bits = v[c].bits | next << 16;
  }
}
ELISION_INLINE void as_weights(const float* x, int64_t n, Pair* out) {
  bf16* to = reinterpret_cast<bf16*>(out);
  int64_t k = 0;
  for (; k + W <= n; k += W) store(to + k, load(x + k));
  if (k < n) store(to + k, load(x + k, n - k), n - k);
  if (n % 2 != 0) out[n / 2].bits &= 0xffff;
}
#endif

template <class T>
struct Attention {
  const elision_attention_args& args;
  Trouble trouble;
  int64_t chunks, chunk;
  float* bias;  // [size_batch, keys]: log(size)

  using Element = typename Multiplied<T>::Element;
  static constexpr int64_t STEP = Multiplied<T>::STEP;
  static int64_t elements(int64_t numbers) { return (numbers + STEP - 1) / STEP; }

  // Scores of a block of queries against packed keys.
  struct Scores {
    const Element *q, *panel;
    int64_t width, columns, stride;  // width: of a head, in elements
    float* out;
    template <int ROWS>
    ELISION_INLINE void tile(int64_t row) {
      int64_t first = 0;
      for (; first + W < columns; first += TILE_COLUMNS) strip<ROWS, 2>(row, first);
      if (first < columns) strip<ROWS, 1>(row, first);
    }
    template <int ROWS, int COLUMNS>
    ELISION_INLINE void strip(int64_t row, int64_t first) {
      Vec acc[ROWS][COLUMNS];
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) acc[i][j] = set(0.0f);
      dot_tile(q + row * width, width, panel + first * width, TILE_COLUMNS, width, acc);
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) store(out + (row + i) * stride + first + j * W, acc[i][j]);
    }
  };

  // out[row] += weights[row] v.
  struct Values {
    const Element *weights, *v;
    int64_t keys, stride, columns;  // keys and stride in elements; columns: value width, padded
    float* out;
    template <int ROWS>
    ELISION_INLINE void tile(int64_t row) {
      for (int64_t first = 0; first < columns; first += TILE_COLUMNS) {
        Vec acc[ROWS][2];
        for (int i = 0; i < ROWS; ++i) {
          acc[i][0] = load(out + (row + i) * columns + first);
          acc[i][1] = load(out + (row + i) * columns + first + W);
        }
        dot_tile(weights + row * stride, stride, v + first, columns, keys, acc);
        for (int i = 0; i < ROWS; ++i) {
          store(out + (row + i) * columns + first, acc[i][0]);
          store(out + (row + i) * columns + first + W, acc[i][1]);
        }
      }
    }
  };

  ELISION_INLINE float mask_at(const char* mask, int64_t at) const {
    switch (args.mask_dtype) {
      case ELISION_BOOL: return reinterpret_cast<const uint8_t*>(mask)[at] ? 0.0f : args.masked;
      case ELISION_F16: return widen(reinterpret_cast<const f16*>(mask)[at]);
      case ELISION_BF16: return widen(reinterpret_cast<const bf16*>(mask)[at]);
      default: return reinterpret_cast<const float*>(mask)[at];
    }
  }

  // One row of logits: scale, biases, exponentials against the running maximum. `added` is what scores of this
  // row get besides: log(size), or null. Returns the factor for what was summed before.
  ELISION_INLINE float soften(float* row, int64_t keys, const float* added, float* running, float* total) const {
    const Vec scale = set(args.scale), lowest = set(-__builtin_inff());
    Vec top = lowest;
    int64_t j = 0;
    for (; j + W <= keys; j += W) {
      Vec logit = mul(load(row + j), scale);
      if (added != nullptr) logit = add(logit, load(added + j));
      store(row + j, logit);
      top = most(top, logit);
    }
    float most_here = maximum(top);
    for (; j < keys; ++j) {
      row[j] = row[j] * args.scale + (added != nullptr ? added[j] : 0.0f);
      most_here = larger(most_here, row[j]);
    }
    const float before = *running, now = larger(before, most_here);
    const float base = now > -__builtin_inff() ? now : 0.0f;
    Vec sums = set(0.0f);
    const Vec shift = set(base);
    for (j = 0; j + W <= keys; j += W) {
      const Vec e = exponential(sub(load(row + j), shift));
      store(row + j, e);
      sums = add(sums, e);
    }
    if (j < keys) {
      float part[W];
      for (int i = 0; i < W; ++i) part[i] = -__builtin_inff();
      for (int64_t i = j; i < keys; ++i) part[i - j] = row[i];
      const Vec e = exponential(sub(load(part), shift));
      sums = add(sums, e);
      store(part, e);
      for (int64_t i = j; i < keys; ++i) row[i] = part[i - j];
    }
    float old[W] = {};
    old[0] = before > -__builtin_inff() ? before - base : -__builtin_inff();
    store(old, exponential(load(old)));
    const float factor = old[0];
    *total = *total * factor + sum(sums);
    *running = now;
    return factor;
  }

  void task(int64_t index) {
    const int64_t part = index % chunks, head = index / chunks % args.heads, sample = index / chunks / args.heads;
    const int64_t kv = head / (args.heads / args.kv_heads), width = args.width, value_width = args.value_width;
    const int64_t first_query = part * chunk, queries = smaller(chunk, args.queries - first_query);
    if (queries <= 0) return;
    const int64_t columns = padded_columns(value_width), keys = args.keys, block = smaller(keys, KEY_BLOCK);
    const int64_t stride = padded_columns(block);
    const T* q = static_cast<const T*>(args.q) + sample * args.q_stride[0] + head * args.q_stride[1];
    const T* k = static_cast<const T*>(args.k) + sample * args.k_stride[0] + kv * args.k_stride[1];
    const T* v = static_cast<const T*>(args.v) + sample * args.v_stride[0] + kv * args.v_stride[1];
    T* out = static_cast<T*>(args.out) + sample * args.out_stride[0] + head * args.out_stride[1];
    const char* mask = nullptr;
    if (args.mask != nullptr) {
      const int64_t item = args.mask_dtype == ELISION_BOOL ? 1 : args.mask_dtype == ELISION_F32 ? 4 : 2;
      mask = static_cast<const char*>(args.mask) + (args.mask_offset[sample] + head * args.mask_stride[0]) * item;
    }
    const float* sizes = nullptr;
    if (bias != nullptr) sizes = bias + (args.size_batch == 1 ? 0 : sample / args.batch_per_size * keys);

    // Elements are as large as floats.
    const int64_t depth = elements(width), lines = elements(block);
    const size_t words = static_cast<size_t>(stride * depth + lines * columns + QUERY_BLOCK * (2 * stride + depth) +
                                             chunk * columns + 2 * chunk + depth + stride);
    const Scratch memory(TASK_FLOATS, sizeof(float) * words);
    Element* panel = static_cast<Element*>(memory.data());
    if (panel == nullptr) return trouble.report(TROUBLE_MEMORY);
    Element* values = panel + stride * depth;
    Element* rows = values + lines * columns;
    Element* line = rows + QUERY_BLOCK * depth;
    float* scores = reinterpret_cast<float*>(line + depth);
    Element* weights = reinterpret_cast<Element*>(scores);  // in place where they stay floats
    if (STEP > 1) weights = reinterpret_cast<Element*>(scores + QUERY_BLOCK * stride);
    float* sums = scores + 2 * QUERY_BLOCK * stride;
    float* running = sums + chunk * columns;
    float* total = running + chunk;
    float* added = total + chunk;
    for (int64_t i = 0; i < chunk; ++i) running[i] = -__builtin_inff(), total[i] = 0.0f;
    memset(sums, 0, sizeof(float) * static_cast<size_t>(chunk * columns));

    for (int64_t first_key = 0; first_key < keys; first_key += block) {
      const int64_t here = smaller(block, keys - first_key);
      pack_columns(here, depth, panel, line, [&](int64_t j, Element* to) {
        as_elements(k + (first_key + j) * args.k_stride[2], width, to);
      });
      for (int64_t j = 0; j < here; j += STEP) {
        Element* to = values + j / STEP * columns;
        as_elements(v + (first_key + j) * args.v_stride[2], args.v_stride[2], here - j, value_width, to);
        for (int64_t c = value_width; c < columns; ++c) to[c] = Element{};
      }
      for (int64_t first = 0; first < queries; first += QUERY_BLOCK) {
        const int64_t n = smaller(QUERY_BLOCK, queries - first);
        for (int64_t i = 0; i < n; ++i)
          as_elements(q + (first_query + first + i) * args.q_stride[2], width, rows + i * depth);
        Scores product{rows, panel, depth, here, stride, scores};
        for_row_tiles(n, product);
        for (int64_t i = 0; i < n; ++i) {
          const int64_t query = first_query + first + i;
          const float* extra = sizes == nullptr ? nullptr : sizes + first_key;
          if (mask != nullptr || args.causal) {
            for (int64_t j = 0; j < here; ++j) {
              float x = extra != nullptr ? extra[j] : 0.0f;
              if (mask != nullptr)
                x += mask_at(mask, query * args.mask_stride[1] + (first_key + j) * args.mask_stride[2]);
              if (args.causal && first_key + j > query) x += args.masked;
              added[j] = x;
            }
            extra = added;
          }
          const float factor = soften(scores + i * stride, here, extra, running + first + i, total + first + i);
          as_weights(scores + i * stride, here, weights + i * elements(stride));
          if (first_key > 0) {
            float* old = sums + (first + i) * columns;
            for (int64_t c = 0; c < columns; c += W) store(old + c, mul(load(old + c), set(factor)));
          }
        }
        Values weighted{weights, values, elements(here), elements(stride), columns, sums + first * columns};
        for_row_tiles(n, weighted);
      }
    }
    for (int64_t i = 0; i < queries; ++i) {
      const float* from = sums + i * columns;
      T* to = out + (first_query + i) * args.out_stride[2];
      const Vec by = set(total[i] > 0 || total[i] != total[i] ? total[i] : 1.0f);
      int64_t c = 0;
      for (; c + W <= value_width; c += W) store(to + c, divide(load(from + c), by));
      if (c < value_width) store(to + c, divide(load(from + c, value_width - c), by), value_width - c);
    }
  }

  int run(const elision_runner& runner, char* error, size_t room) {
    const Scratch memory(CALL_FLOATS, args.size == nullptr ? 0 : sizeof(float) * args.size_batch * args.keys);
    bias = nullptr;
    if (args.size != nullptr) {
      bias = static_cast<float*>(memory.data());
      if (bias == nullptr) return fail(error, room, "attention: out of memory");
      for (int64_t i = 0; i < args.size_batch * args.keys; ++i)
        bias[i] = args.size[i] > 0 ? __builtin_logf(larger(args.size[i], 1e-30f)) : NEVER;
    }
    if (args.queries == 0 || args.batch == 0) return 0;
    chunks = (args.queries + QUERY_CHUNK - 1) / QUERY_CHUNK;
    chunk = (args.queries + chunks - 1) / chunks;
    const auto one = [](void* self, size_t i) { static_cast<Attention*>(self)->task(static_cast<int64_t>(i)); };
    runner.run(runner.self, one, this, static_cast<size_t>(args.batch * args.heads * chunks));
    return explain(trouble, "attention", error, room);
  }
};

template <class T>
int attention_of(const elision_attention_args& args, const elision_runner& runner, char* error, size_t room) {
  Attention<T> attention{args, {}, 0, 0, nullptr};
  return attention.run(runner, error, room);
}

inline int attention(const elision_attention_args& args, const elision_runner& runner, char* error, size_t room) {
  if (args.dtype == ELISION_F16) return attention_of<f16>(args, runner, error, room);
  if (args.dtype == ELISION_BF16) return attention_of<bf16>(args, runner, error, room);
  return attention_of<float>(args, runner, error, room);
}

}  // namespace ELISION_VARIANT
}  // namespace elision
