// The C interface: arguments are checked here, once for all variants, and the variant is chosen.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <string>

#include "common.h"
#include "packed.h"

namespace elision {

#define DECLARE(name)           \
  namespace name {              \
  extern const Kernels kernels; \
  }
DECLARE(portable)
#if defined(ELISION_X86)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
#endif
#undef DECLARE

namespace {

#if defined(ELISION_X86)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

constexpr int MOST = 4;  // variants

// Best first.
int usable(const Kernels** found) {
  int count = 0;
#if defined(ELISION_X86)
  __builtin_cpu_init();
  if (runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) found[count++] = &avx512_bf16::kernels;
  if (runs_avx512()) found[count++] = &avx512::kernels;
  if (runs_avx2()) found[count++] = &avx2::kernels;
#endif
  found[count++] = &portable::kernels;
  return count;
}

// A variant that is asked for but cannot run here is not taken: the hosts compare elision_variant() with the wish.
const Kernels& choose() {
  const Kernels* found[MOST];
  const int count = usable(found);
  const char* wish = getenv("ELISION_ISA");
  for (int i = 0; wish != nullptr && i < count; ++i)
    if (strcmp(wish, found[i]->name) == 0) return *found[i];
  return *found[0];
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

bool known(int32_t dtype) { return dtype == ELISION_F32 || dtype == ELISION_F16 || dtype == ELISION_BF16; }

// All lengths of one tensor fit the address space, with room for padding and for scratch beside it. An axis of length 0
// counts as 1: what is made of the other axes alone must fit too.
template <size_t N>
bool fits(const int64_t (&lengths)[N]) {
  int64_t nonempty[N], total;
  for (size_t i = 0; i < N; ++i) nonempty[i] = lengths[i] == 0 ? 1 : lengths[i];
  return product(&total, nonempty, N) && total <= INT64_MAX >> 13;
}

bool serves(int64_t rows, int64_t batch) { return rows == 1 || rows == batch; }

int misfit(const char* op, char* error, size_t room) {
  return fail(error, room, "%s: the operands' lengths do not fit together", op);
}

}  // namespace
}  // namespace elision

using namespace elision;

extern "C" {

int elision_match(const elision_match_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_match_args& a = *args;
  if (!known(a.dtype)) return fail(error, room, "match_tokens: the metric is neither float32, float16 nor bfloat16");
  if (!fits({a.batch, a.count, a.width}) || a.count > INT32_MAX / 4 || a.gone < 0 || a.gone > a.count / 2)
    return misfit("match_tokens", error, room);
  if (a.size != nullptr && !serves(a.size_batch, a.batch)) return misfit("match_tokens", error, room);
  if (a.prefix < 0 || a.suffix < 0 || a.prefix > INT32_MAX || a.suffix > INT32_MAX)
    return fail(error, room, "match_tokens: prefix and suffix must not be negative");
  if (a.r < 0 && (a.denominator < 1 || a.numerator < 0 || a.numerator > a.denominator || a.denominator > 1000000))
    return fail(error, room, "match_tokens: give r >= 0 or a ratio between 0 and 1");
  // Who goes and who stays is written for exactly this many.
  const int64_t free = a.count - a.prefix - a.suffix;
  const int64_t wish = a.r >= 0 ? a.r : a.count * a.numerator / a.denominator;
  if (a.gone != (free < 2 ? 0 : wish < free / 2 ? wish : free / 2)) return misfit("match_tokens", error, room);
  if (a.batch == 0 || a.count == 0) return 0;
  return kernels().match(a, *runner, error, room);
}

int elision_mean(const elision_mean_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_mean_args& a = *args;
  if (!known(a.dtype)) return fail(error, room, "mean_heads: k is neither float32, float16 nor bfloat16");
  if (!fits({a.batch, a.heads, a.tokens, a.width}) || a.heads < 1) return misfit("mean_heads", error, room);
  if (a.batch == 0 || a.tokens == 0) return 0;
  return kernels().mean(a, *runner, error, room);
}

int elision_merge(const elision_merge_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_merge_args& a = *args;
  const elision_layout& l = a.layout;
  if (!known(a.dtype)) return fail(error, room, "merge_tokens: x is neither float32, float16 nor bfloat16");
  if (!fits({l.pre, a.batch, l.mid, a.count, l.width}) || !fits({l.pre, a.batch, l.mid, a.left, l.width}) ||
      !fits({a.batch, a.gone}) || a.count > INT32_MAX || a.left > a.count || a.gone > a.count)
    return misfit("merge_tokens", error, room);
  if (!serves(a.x_batch, a.batch) || !serves(a.map_batch, a.batch) || (a.size != nullptr && !serves(a.size_batch, a.batch)))
    return misfit("merge_tokens", error, room);
  if (a.batch == 0) return 0;
  return kernels().merge(a, *runner, error, room);
}

int elision_restore(const elision_restore_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_restore_args& a = *args;
  const elision_layout& l = a.layout;
  if (a.itemsize != 1 && a.itemsize != 2 && a.itemsize != 4 && a.itemsize != 8)
    return fail(error, room, "restore_tokens: elements of %d bytes are not known", static_cast<int>(a.itemsize));
  if (!fits({l.pre, a.batch, l.mid, a.count, l.width}) || !fits({l.pre, a.batch, l.mid, a.left, l.width}) ||
      !serves(a.y_batch, a.batch) || !serves(a.map_batch, a.batch))
    return misfit("restore_tokens", error, room);
  if (a.batch == 0 || a.count == 0) return 0;
  return kernels().restore(a, *runner, error, room);
}

int elision_attention(const elision_attention_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_attention_args& a = *args;
  if (!known(a.dtype)) return fail(error, room, "attention: q is neither float32, float16 nor bfloat16");
  if (a.mask != nullptr && a.mask_offset == nullptr) return fail(error, room, "attention: the mask has no offsets");
  if (a.mask != nullptr && !known(a.mask_dtype) && a.mask_dtype != ELISION_BOOL)
    return fail(error, room, "attention: the mask is neither bool nor a float type");
  if (!fits({a.batch, a.heads, a.queries, a.width}) || !fits({a.batch, a.heads, a.keys, a.value_width}) ||
      !fits({a.batch, a.heads, a.keys, a.width}) || !fits({a.batch, a.heads, a.queries, a.value_width}))
    return misfit("attention", error, room);
  if (a.heads > 0 && (a.kv_heads < 1 || a.heads % a.kv_heads != 0))
    return fail(error, room, "attention: %lld heads of keys do not divide %lld heads", static_cast<long long>(a.kv_heads),
                static_cast<long long>(a.heads));
  if (a.size != nullptr && (a.batch_per_size < 1 || a.batch % a.batch_per_size != 0 ||
                            !serves(a.size_batch, a.batch / a.batch_per_size)))
    return misfit("attention", error, room);
  if (a.batch == 0 || a.heads == 0 || a.queries == 0 || a.value_width == 0) return 0;
  return kernels().attention(a, *runner, error, room);
}

int elision_linear(const elision_linear_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_linear_args& a = *args;
  const char* op = a.values == nullptr ? "linear" : "linear_topk";
  if (!known(a.dtype)) return fail(error, room, "%s: x is neither float32, float16 nor bfloat16", op);
  PackedHeader header;
  if (a.packed_bytes < PACKED_HEADER) return fail(error, room, "%s: the weight was not packed", op);
  memcpy(&header, a.packed, sizeof header);
  PackedHeader again = header;
  again.unused = 0;
  if (header.magic != PACKED_MAGIC || !complete(again) || packed_bytes(again) != a.packed_bytes ||
      memcmp(&again, &header, sizeof header) != 0)
    return fail(error, room, "%s: the weight was not packed, or by another version of elision", op);
  if (a.width != header.width || a.channels != header.channels || !fits({a.rows, a.width}) || !fits({a.rows, a.channels}))
    return misfit(op, error, room);
  if (a.values != nullptr && (a.k < 1 || a.k > a.channels || a.channels > INT32_MAX || !fits({a.rows, a.k})))
    return fail(error, room, "linear_topk: k is between 1 and %lld, not %lld", static_cast<long long>(a.channels),
                static_cast<long long>(a.k));
  if (a.rows == 0 || a.channels == 0) return 0;
  return kernels().linear(a, header, *runner, error, room);
}

int elision_cached(const elision_cached_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_cached_args& a = *args;
  if (!known(a.cache_dtype)) return fail(error, room, "cached_attention: the caches are neither float32, float16 nor bfloat16");
  if (!fits({a.rows, a.heads, a.width}) || !fits({a.rows, a.heads, a.value_width}) || !fits({a.rows, a.columns}) ||
      !fits({a.kv_heads, a.capacity, a.width}) || !fits({a.kv_heads, a.capacity, a.value_width}) ||
      a.capacity > INT32_MAX || (a.bias != nullptr && (!serves(a.bias_heads, a.heads) || a.bias_length < 1)))
    return misfit("cached_attention", error, room);
  if (a.kv_heads < 1 || a.heads % a.kv_heads != 0)
    return fail(error, room, "cached_attention: %lld heads of keys do not divide %lld heads",
                static_cast<long long>(a.kv_heads), static_cast<long long>(a.heads));
  if (a.window < 0 || a.softcap < 0) return fail(error, room, "cached_attention: window and softcap must not be negative");
  if (a.rotary < 0 || a.rotary > 2) return fail(error, room, "cached_attention: rotary is 0, 1 or 2");
  if (a.rotary != 0 && (a.cos == nullptr || a.sin == nullptr || a.turned < 0 || a.turned > a.width || a.turned % 2 != 0))
    return fail(error, room, "cached_attention: %lld channels of %lld cannot be turned", static_cast<long long>(a.turned),
                static_cast<long long>(a.width));
  const auto whole = [](const float* norm, int64_t length, int64_t width, int64_t heads, const int64_t* stride) {
    return norm == nullptr || length == width || (length == heads * width && stride[1] == width);
  };
  if (!whole(a.q_norm, a.q_norm_length, a.width, a.heads, a.q_stride) ||
      !whole(a.k_norm, a.k_norm_length, a.width, a.kv_heads, a.k_stride))
    return fail(error, room, "cached_attention: a norm has as many weights as a head is wide, or all heads");
  if (a.rows == 0) return 0;
  return kernels().cached(a, *runner, error, room);
}

int elision_gated(const elision_gated_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_gated_args& a = *args;
  if (a.fn < 0 || a.fn >= ELISION_FUNCTIONS) return fail(error, room, "gated: there is no function %d", static_cast<int>(a.fn));
  if (!fits({a.rows, a.width})) return misfit("gated", error, room);
  if (a.rows == 0 || a.width == 0) return 0;
  return kernels().gated(a, *runner, error, room);
}

int elision_norm(const elision_norm_args* args, const elision_runner* runner, char* error, size_t room) {
  const elision_norm_args& a = *args;
  if (!fits({a.rows, a.width})) return misfit("rms_norm", error, room);
  if ((a.residual == nullptr) != (a.total == nullptr))
    return fail(error, room, "rms_norm: what is added needs room for the sum, and the sum something to add");
  if (a.rows == 0 || a.width == 0) return 0;
  return kernels().norm(a, *runner, error, room);
}

const char* elision_variant(void) { return kernels().name; }

const char* elision_variants(void) {
  static const std::string all = [] {
    const Kernels* found[MOST];
    const int count = usable(found);
    std::string text;
    for (int i = 0; i < count; ++i) text += (i ? " " : "") + std::string(found[i]->name);
    return text;
  }();
  return all.c_str();
}

// What was meant by a share that went through a float32, that is, within half the distance of two of them: a decimal,
// n / most, as 0.3 is 3/10; else the simplest fraction, as 0.33333334 is 1/3; else the closest one.
void elision_fraction(float share, int64_t most, int64_t* numerator, int64_t* denominator) {
  const double wanted = share, slack = (static_cast<double>(nextafterf(share, 2.0f)) - wanted) * 0.5;
  double closest = HUGE_VAL;
  for (int64_t i = 0; i <= most; ++i) {
    const int64_t d = i == 0 ? most : i;
    const double n = nearbyint(wanted * static_cast<double>(d)), off = fabs(n / static_cast<double>(d) - wanted);
    if (off >= closest) continue;
    closest = off, *numerator = static_cast<int64_t>(n), *denominator = d;
    if (off <= slack) return;
  }
}

int elision_abi(void) { return 7; }
}
