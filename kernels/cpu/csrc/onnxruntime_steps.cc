// The ops of step graphs as custom ops: new rows against a cache, and gated activations.
#include <math.h>
#include <string.h>

#include "ort_host.h"

namespace elision {
namespace ort {
namespace {

enum { Q, K, V, KEY_CACHE, VALUE_CACHE, SLOTS, PREFIX, ANCESTORS, BIAS, COS, SIN, Q_NORM, K_NORM };

const float* floats(const Tensor& t) { return static_cast<const float*>(t.data); }
const int32_t* integers(const Tensor& t) { return static_cast<const int32_t*>(t.data); }

// The cache to write to: the session's buffer for the result, with what the operand holds. Where both are one buffer
// (a caller bound it as both), nothing is moved.
void* cache(const Kernel& kernel, OrtKernelContext* context, const Tensor& from, size_t index) {
  void* to = kernel.output(context, index, from.dims, 3);
  const int64_t bytes = times(times(times(from.dims[0], from.dims[1]), from.dims[2]), from.dtype == ORT_FLOAT ? 4 : 2);
  if (to != from.data && bytes > 0) memcpy(to, from.data, static_cast<size_t>(bytes));
  return to;
}

void cached(const Kernel& kernel, OrtKernelContext* context) {
  const Attributes& at = kernel.attributes;
  const bool joined = at.heads != 0;
  const std::string name = kernel.op->name;
  const auto misfit = [&](bool wrong, const char* what) {
    if (wrong) stop(name + ": " + what);
  };
  const Tensor q = kernel.input(context, Q, joined ? 3 : 4), k = kernel.input(context, K, joined ? 3 : 4);
  const Tensor v = kernel.input(context, V, joined ? 3 : 4);
  const Tensor keys = kernel.input(context, KEY_CACHE, 3), values = kernel.input(context, VALUE_CACHE, 3);
  const Tensor slots = kernel.input(context, SLOTS, 1), prefix = kernel.input(context, PREFIX, 2);
  const Tensor ancestors = kernel.input(context, ANCESTORS, 2), bias = kernel.input(context, BIAS, 2);
  elision_cached_args args{};
  args.q = floats(q), args.k = floats(k), args.v = floats(v), args.cache_dtype = keys.dtype;
  args.kv_heads = keys.dims[0], args.capacity = keys.dims[1], args.width = keys.dims[2];
  args.value_width = values.dims[2];
  args.heads = joined ? at.heads : q.dims[1], args.rows = joined ? q.dims[1] : q.dims[2];
  const int64_t h = args.heads, shared = args.kv_heads, d = args.width, e = args.value_width, m = args.rows;
  misfit(q.dims[0] != 1, "a step graph has batch 1");
  misfit(values.dims[0] != shared || values.dims[1] != args.capacity, "the caches differ in heads or slots");
  misfit(joined && at.kv_heads != shared, "kv_heads is not that of the caches");
  const auto fits = [&](const Tensor& t, int64_t heads, int64_t width) {
    if (joined) return t.dims[0] == 1 && t.dims[1] == m && t.dims[2] == times(heads, width);
    return t.dims[0] == 1 && t.dims[1] == heads && t.dims[2] == m && t.dims[3] == width;
  };
  const auto strides = [&](int64_t* out, int64_t heads, int64_t width) {
    out[0] = joined ? times(heads, width) : width;
    out[1] = joined ? width : times(m, width);
  };
  strides(args.q_stride, h, d), strides(args.k_stride, shared, d), strides(args.v_stride, shared, e);
  strides(args.out_stride, h, e);
  if (joined && k.absent() && v.absent()) {
    const int64_t whole = times(h, d) + times(shared, d) + times(shared, e);
    misfit(q.dims[2] != whole, "q, k and v side by side do not have the caches' heads and widths");
    args.k = args.q + h * d, args.v = args.k + shared * d;
    args.q_stride[0] = args.k_stride[0] = args.v_stride[0] = whole;
  } else {
    misfit(k.absent() || v.absent(), "k and v are both given, or neither");
    misfit(!fits(q, h, d) || !fits(k, shared, d) || !fits(v, shared, e), "q, k, v and the caches do not fit together");
  }
  misfit(slots.dims[0] != m || prefix.dims[0] != m || prefix.dims[1] != 2 || ancestors.dims[0] != m,
         "slots, prefix and ancestors are not those of the rows");
  args.slots = integers(slots), args.prefix = integers(prefix), args.ancestors = integers(ancestors);
  args.columns = ancestors.dims[1];
  if (!bias.absent()) args.bias = floats(bias), args.bias_heads = bias.dims[0], args.bias_length = bias.dims[1];
  if (joined) {
    const Tensor cos = kernel.input(context, COS), sin = kernel.input(context, SIN);
    const Tensor q_norm = kernel.input(context, Q_NORM, 1), k_norm = kernel.input(context, K_NORM, 1);
    if (at.rotary != 0) {
      for (const Tensor* t : {&cos, &sin})
        misfit(t->rank < 2 || t->rank > 3 || t->dims[t->rank - 2] != m || (t->rank == 3 && t->dims[0] != 1) ||
                   t->dims[t->rank - 1] != cos.dims[cos.rank - 1],
               "cos and sin are not [1, rows, channels] or [rows, channels]");
      args.cos = floats(cos), args.sin = floats(sin), args.turned = cos.dims[cos.rank - 1];
    }
    if (!q_norm.absent()) args.q_norm = floats(q_norm), args.q_norm_length = q_norm.dims[0];
    if (!k_norm.absent()) args.k_norm = floats(k_norm), args.k_norm_length = k_norm.dims[0];
  }
  args.window = at.window, args.softcap = at.softcap, args.eps = at.eps, args.norm_offset = at.norm_offset;
  args.key_bias = at.key_bias != 0, args.rotary = static_cast<int32_t>(at.rotary);
  args.scale = at.scale != 0.0f ? at.scale : 1.0f / sqrtf(static_cast<float>(d > 0 ? d : 1));
  const int64_t apart[4] = {1, h, m, e}, together[3] = {1, m, times(h, e)};
  args.out = static_cast<float*>(kernel.output(context, 0, joined ? together : apart, joined ? 3 : 4));
  args.key_cache = cache(kernel, context, keys, 1), args.value_cache = cache(kernel, context, values, 2);
  call(elision_cached, args, kernel, context);
}

constexpr const char* FUNCTIONS[] = {"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid", "tanh"};

void find_function(Kernel& kernel, const OrtKernelInfo*) {
  for (const char* name : FUNCTIONS)
    if (kernel.attributes.fn == name) return;
  stop("gated: " + kernel.attributes.fn + " is no function that it knows");
}

void gated(const Kernel& kernel, OrtKernelContext* context) {
  const Tensor x = kernel.input(context, 0), y = kernel.input(context, 1);
  if (x.rank == 0) stop("gated: x has no axes");
  elision_gated_args args{};
  for (; kernel.attributes.fn != FUNCTIONS[args.fn];) ++args.fn;
  args.rows = 1, args.width = x.dims[x.rank - 1];
  for (size_t a = 0; a + 1 < x.rank; ++a) args.rows = times(args.rows, x.dims[a]);
  args.x = floats(x), args.x_stride = args.y_stride = args.width;
  int64_t dims[MOST_RANK];
  memcpy(dims, x.dims, sizeof dims);
  if (y.absent()) {
    if (args.width % 2 != 0) stop("gated: x is not two halves side by side");
    args.width /= 2, args.y = args.x + args.width;
    dims[x.rank - 1] = args.width;
  } else {
    if (y.rank != x.rank || memcmp(x.dims, y.dims, sizeof(int64_t) * x.rank) != 0)
      stop("gated: x and y differ in shape");
    args.y = floats(y);
  }
  args.out = static_cast<float*>(kernel.output(context, 0, dims, x.rank));
  call(elision_gated, args, kernel, context);
}

// rms_norm(x, weight), and add_rms_norm(x, residual, weight) with the sum as a second result.
void norm(const Kernel& kernel, OrtKernelContext* context) {
  const std::string name = kernel.op->name;
  const bool adds = name.compare(0, 3, "add") == 0;
  const Tensor x = kernel.input(context, 0), weight = kernel.input(context, adds ? 2 : 1, 1);
  if (x.rank == 0) stop(name + ": x has no axes");
  elision_norm_args args{};
  args.rows = 1, args.width = x.dims[x.rank - 1];
  for (size_t a = 0; a + 1 < x.rank; ++a) args.rows = times(args.rows, x.dims[a]);
  if (weight.dims[0] != args.width) stop(name + ": there is no weight for every channel");
  args.x = floats(x), args.weight = floats(weight), args.eps = kernel.attributes.eps;
  args.out = static_cast<float*>(kernel.output(context, 0, x.dims, x.rank));
  if (adds) {
    const Tensor residual = kernel.input(context, 1);
    if (residual.rank != x.rank || memcmp(x.dims, residual.dims, sizeof(int64_t) * x.rank) != 0)
      stop(name + ": x and residual differ in shape");
    args.residual = floats(residual);
    args.total = static_cast<float*>(kernel.output(context, 1, x.dims, x.rank));
  }
  call(elision_norm, args, kernel, context);
}

}  // namespace

void add_step_ops(Ops& all) {
  const int f = ORT_FLOAT, i = ORT_INT32;
  for (const int t : {ORT_FLOAT, ORT_FLOAT16, ORT_BFLOAT16}) {
    const std::vector<bool> bias{false, false, false, false, false, false, false, false, true};
    all.push_back(make("cached_attention", t, {f, f, f, t, t, i, i, i, f}, {f, t, t}, bias, cached));
    const std::vector<bool> optional{false, true, true, false, false, false, false, false, true, true, true, true, true};
    all.push_back(make("joined_cached_attention", t, {f, f, f, t, t, i, i, i, f, f, f, f, f}, {f, t, t}, optional, cached));
  }
  all.push_back(make("gated", f, {f, f}, {f}, {false, true}, gated, find_function));
  all.push_back(make("rms_norm", f, {f, f}, {f}, {false, false}, norm));
  all.push_back(make("add_rms_norm", f, {f, f, f}, {f, f}, {false, false, false}, norm));
}

}  // namespace ort
}  // namespace elision
