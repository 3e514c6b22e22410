// The C interface of the kernels: plain structs, no allocation across it, the same for every host.
//
// Every call returns 0, or 1 with a sentence in `error`. Element types carry ONNX's numbers. Tensors are dense in
// the stated order unless strides are given; strides and lengths count elements. A result depends on the operands
// only: not on the number of threads, not on earlier calls.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define ELISION_API __declspec(dllexport)
#else
#define ELISION_API __attribute__((visibility("default")))
#endif

enum { ELISION_F32 = 1, ELISION_U8 = 2, ELISION_BOOL = 9, ELISION_F16 = 10, ELISION_BF16 = 16 };

// Runs task(data, 0), ..., task(data, count - 1), in any order and on any threads, and returns when all are done.
typedef void (*elision_task)(void* data, size_t index);
typedef struct {
  void (*run)(void* self, elision_task task, void* data, size_t count);
  void* self;
} elision_runner;

// match_tokens and match_padded_tokens: metric [batch, count, width] -> slot [batch, count],
// keep [batch, count - gone], source [batch, gone].
typedef struct {
  const void* metric;
  const float* size;  // [size_batch, count], 0 is padding; null: every token is real
  int32_t *slot, *keep, *source;
  int64_t batch, count, width, size_batch;
  int64_t gone;                      // tokens removed of `count` real ones
  int64_t r, numerator, denominator; // wish per sample: r, or with r < 0 floor(n * numerator / denominator)
  int64_t prefix, suffix;
  int32_t dtype, published;
} elision_match_args;

// mean_heads: k [batch, heads, tokens, width] -> metric [batch, tokens, width]. Strides are those of the batch, head
// and token axes; the last axis is dense.
typedef struct {
  const void* k;
  void* metric;
  int64_t batch, heads, tokens, width;
  int64_t k_stride[3];
  int32_t dtype;
} elision_mean_args;

// Where the tokens of a dense value stand: [pre, batch, mid, tokens, width], or with `swapped`
// [pre, tokens, mid, batch, width].
typedef struct {
  int64_t pre, mid, width;
  int32_t swapped;
} elision_layout;

// merge_tokens: x -> y with `left` tokens instead of `count`, new_size [batch, left]. The map's tensors have
// map_batch rows, x has x_batch, size has size_batch: `batch`, or 1 for all.
typedef struct {
  const void* x;
  void* y;
  const float* size;  // null: every size is 1
  const int32_t *slot, *keep, *source;
  float* new_size;
  int64_t batch, x_batch, size_batch, map_batch;
  int64_t count, left, gone;
  elision_layout layout;
  int32_t dtype;
} elision_merge_args;

// restore_tokens: y with `left` tokens -> x with `count`; slot [map_batch, count], -1 gives zeros.
typedef struct {
  const void* y;
  void* x;
  const int32_t* slot;
  int64_t batch, y_batch, map_batch;
  int64_t count, left;
  elision_layout layout;
  int32_t itemsize;  // bytes of an element: 1, 2, 4 or 8
} elision_restore_args;

// attention: q [batch, heads, queries, width], k [batch, kv_heads, keys, width], v [.., keys, value_width] -> out.
// Strides are those of the batch, head and token axes; the last axis is dense.
typedef struct {
  const void *q, *k, *v;
  void* out;
  const void* mask;            // null, bool (true attends) or additive
  const int64_t* mask_offset;  // [batch]: where a batch entry's mask begins
  const float* size;           // [size_batch, keys] or null
  int64_t batch, heads, kv_heads, queries, keys, width, value_width, size_batch;
  int64_t batch_per_size;      // batch entries that share one row of size (leading axes behind the first)
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t mask_stride[3];      // head, query, key; 0 where it is broadcast
  float scale;
  float masked;  // what a key that must not be attended to adds to its logit; -inf: a row without keys is 0
  int32_t causal, dtype, mask_dtype;
} elision_attention_args;

// A weight in the order in which the products read it. bits 4 and 8: weight uint8 [channels, groups, group * bits / 8]
// (of a byte the low nibble comes first) with groups = ceil(width / group), scales [channels, groups] float32 or float16,
// zeros null, uint8 (zero points) or float32 or float16 (offsets). bits 16 and 32: weight [channels, width].
typedef struct {
  const void *weight, *scales, *zeros;
  void* packed;  // of elision_packed_bytes
  int64_t channels, width, group;
  int32_t bits, weight_dtype, scale_dtype, zero_dtype;  // 0: absent
} elision_pack_args;

// The product of x [rows, width] with a packed weight: out [rows, channels], or with `values` the k largest of a row and
// where they are, descending, the first among equals first; with `spread` besides, of the softmax of all channels, the log
// of the sum and the entropy. norm [width]: x / sqrt(mean(x^2) + eps) * (norm + norm_offset) takes the place of x.
typedef struct {
  const void *x, *packed;
  const float *bias, *norm;  // [channels], [width]; null: none
  void* out;
  float* values;     // [rows, k] or null
  int64_t* indices;  // [rows, k]
  float* spread;     // [rows, 2] or null
  int64_t rows, width, channels, packed_bytes, k;
  float eps, norm_offset;
  int32_t dtype;  // of x and out
} elision_linear_args;

// cached_attention and joined_cached_attention: q [rows, heads, width], k, v [rows, kv_heads, ..] -> out, through caches
// [kv_heads, capacity, width] and [.., value_width], which are written to. Strides are those of the row and head axes.
typedef struct {
  const float *q, *k, *v;
  float* out;
  void *key_cache, *value_cache;              // of cache_dtype
  const int32_t *slots, *prefix, *ancestors;  // [rows], [rows, 2], [rows, columns]
  const float* bias;                          // [bias_heads, bias_length] or null
  const float *cos, *sin;                     // [rows, turned], with rotary 1 or 2
  const float *q_norm, *k_norm;               // [width], or over all heads, or null
  int64_t rows, heads, kv_heads, capacity, width, value_width, columns;
  int64_t bias_heads, bias_length, turned, q_norm_length, k_norm_length;
  int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2];
  int64_t window;  // 0: none
  float scale, softcap, eps, norm_offset;
  int32_t key_bias, rotary, cache_dtype;
} elision_cached_args;

// gated: out[r] = fn(x[r]) * y[r], rows of `width` floats.
enum {
  ELISION_SILU,
  ELISION_GELU,
  ELISION_GELU_TANH,
  ELISION_QUICK_GELU,
  ELISION_RELU,
  ELISION_SIGMOID,
  ELISION_TANH,
  ELISION_FUNCTIONS
};
typedef struct {
  const float *x, *y;
  float* out;
  int64_t rows, width, x_stride, y_stride;
  int32_t fn;
} elision_gated_args;

// rms_norm: out = x / sqrt(mean(x^2) + eps) * weight, rows of `width` floats; add_rms_norm with residual and total: of
// total = x + residual.
typedef struct {
  const float *x, *residual, *weight;
  float *out, *total;
  int64_t rows, width;
  float eps;
} elision_norm_args;

ELISION_API int elision_match(const elision_match_args* args, const elision_runner* runner, char* error, size_t room);
ELISION_API int elision_mean(const elision_mean_args* args, const elision_runner* runner, char* error, size_t room);
ELISION_API int elision_merge(const elision_merge_args* args, const elision_runner* runner, char* error, size_t room);
ELISION_API int elision_restore(const elision_restore_args* args, const elision_runner* runner, char* error,
                                size_t room);
ELISION_API int elision_attention(const elision_attention_args* args, const elision_runner* runner, char* error,
                                  size_t room);

// Bytes of the packed weight; 0: there is no such weight. `packed` is not read.
ELISION_API int64_t elision_packed_bytes(const elision_pack_args* args);
ELISION_API int elision_pack(const elision_pack_args* args, const elision_runner* runner, char* error, size_t room);
// Room for a packed weight, in large pages where there are any; null: there is none. Freed by its address.
ELISION_API void* elision_weight_memory(size_t bytes);
ELISION_API void elision_free_weight(void* memory);
ELISION_API int elision_linear(const elision_linear_args* args, const elision_runner* runner, char* error, size_t room);

ELISION_API int elision_cached(const elision_cached_args* args, const elision_runner* runner, char* error, size_t room);
ELISION_API int elision_gated(const elision_gated_args* args, const elision_runner* runner, char* error, size_t room);
ELISION_API int elision_norm(const elision_norm_args* args, const elision_runner* runner, char* error, size_t room);

// Threads for hosts that bring none: *runner uses at most `threads` of them, the caller's included.
ELISION_API void elision_own_threads(int threads, elision_runner* runner);

// GOMP_parallel of the OpenMP library that the host runs on; from then on *runner above uses the threads of that, in
// this process and not in its forks. Null: our own pool.
typedef void (*elision_parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);
ELISION_API void elision_borrow_threads(elision_parallel parallel);

// "avx512_bf16", "avx512", "avx2" or "portable": the variant in use. ELISION_ISA in the environment asks for one.
ELISION_API const char* elision_variant(void);
// The variants that this processor runs, separated by spaces.
ELISION_API const char* elision_variants(void);
// The best fraction at most `most` in the denominator for a share that went through a float32.
ELISION_API void elision_fraction(float share, int64_t most, int64_t* numerator, int64_t* denominator);
// Changes whenever a struct above does.
ELISION_API int elision_abi(void);

#ifdef __cplusplus
}
#endif
