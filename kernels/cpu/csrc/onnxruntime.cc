// The kernels as custom ops of ONNX Runtime, in the domain "elision": operands and results stay where the session has
// them, and its own threads run the tasks. Here: merging tokens, and what a session asks of any op.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <deque>
#include <mutex>
#include <new>
#include <utility>

#include "ort_host.h"

namespace elision {
namespace ort {
namespace {

constexpr int64_t MOST_DENOMINATOR = 10000;  // as kernels/lengths.py: MOST_DENOMINATOR
constexpr float MASKED = -6e4f;              // as the function body of attention: finite, so that no row is without keys

// ---- the ops -------------------------------------------------------------------------------------------
int64_t floor_share(int64_t n, int64_t numerator, int64_t denominator) {
  return n / denominator * numerator + n % denominator * numerator / denominator;
}

void match(const Kernel& kernel, OrtKernelContext* context) {
  const Attributes& at = kernel.attributes;
  const bool padded = kernel.op->inputs.size() > 1;
  const Tensor metric = kernel.input(context, 0, 3);
  const Tensor size = padded ? kernel.input(context, 1, 2) : Tensor{};
  elision_match_args args{};
  args.metric = metric.data, args.dtype = metric.dtype;
  args.batch = metric.dims[0], args.count = metric.dims[1], args.width = metric.dims[2];
  if (padded) {
    if (size.dims[1] != args.count) stop(std::string(kernel.op->name) + ": size and metric differ in tokens");
    args.size = static_cast<const float*>(size.data), args.size_batch = size.dims[0];
  }
  args.r = at.r, args.numerator = at.numerator, args.denominator = at.denominator;
  args.prefix = at.prefix, args.suffix = at.suffix, args.published = at.published;
  const int64_t wish = at.r >= 0 ? at.r : floor_share(args.count, args.numerator, args.denominator);
  const int64_t free = args.count - at.prefix - at.suffix;
  args.gone = free < 2 ? 0 : wish < free / 2 ? wish : free / 2;
  const int64_t slot[2] = {args.batch, args.count}, keep[2] = {args.batch, args.count - args.gone};
  const int64_t source[2] = {args.batch, args.gone};
  args.slot = static_cast<int32_t*>(kernel.output(context, 0, slot, 2));
  args.keep = static_cast<int32_t*>(kernel.output(context, 1, keep, 2));
  args.source = static_cast<int32_t*>(kernel.output(context, 2, source, 2));
  call(elision_match, args, kernel, context);
}

void mean(const Kernel& kernel, OrtKernelContext* context) {
  const Tensor k = kernel.input(context, 0, 4);
  elision_mean_args args{};
  args.k = k.data, args.dtype = k.dtype;
  args.batch = k.dims[0], args.heads = k.dims[1], args.tokens = k.dims[2], args.width = k.dims[3];
  args.k_stride[2] = args.width, args.k_stride[1] = times(args.tokens, args.width);
  args.k_stride[0] = times(args.heads, args.k_stride[1]);
  const int64_t dims[3] = {k.dims[0], k.dims[2], k.dims[3]};
  args.metric = kernel.output(context, 0, dims, 3);
  call(elision_mean, args, kernel, context);
}

// The batch of x and of a map together.
int64_t joint_batch(const Kernel& kernel, int64_t own, int64_t of_map) {
  if (kernel.attributes.batch_axis < 0 && of_map != 1)
    stop(std::string(kernel.op->name) + ": without a batch axis the map is one sample");
  if (own == 0 || of_map == 0) return 0;
  return own > of_map ? own : of_map;
}

// Axes of a dense tensor around its tokens and its batch.
elision_layout layout_of(const Kernel& kernel, const Tensor& x, int64_t* batch, int64_t* tokens) {
  const int64_t axis = kernel.attributes.axis, batch_axis = kernel.attributes.batch_axis;
  const int64_t rank = static_cast<int64_t>(x.rank);
  if (axis < 0 || axis >= rank || batch_axis < -1 || batch_axis >= rank || axis == batch_axis)
    stop(std::string(kernel.op->name) + ": axis and batch axis do not fit the operand");
  elision_layout layout{1, 1, 1, 0};
  const int64_t low = batch_axis < 0 ? axis : axis < batch_axis ? axis : batch_axis;
  const int64_t high = batch_axis < 0 ? axis : axis < batch_axis ? batch_axis : axis;
  for (int64_t a = 0; a < rank; ++a) {
    if (a == axis || a == batch_axis) continue;
    int64_t& part = a < low ? layout.pre : a < high ? layout.mid : layout.width;
    part = times(part, x.dims[a]);
  }
  layout.swapped = batch_axis > axis;
  *batch = batch_axis < 0 ? 1 : x.dims[batch_axis];
  *tokens = x.dims[axis];
  return layout;
}

void merge(const Kernel& kernel, OrtKernelContext* context) {
  const Tensor x = kernel.input(context, 0), size = kernel.input(context, 1, 2), slot = kernel.input(context, 2, 2);
  const Tensor keep = kernel.input(context, 3, 2), source = kernel.input(context, 4, 2);
  elision_merge_args args{};
  args.layout = layout_of(kernel, x, &args.x_batch, &args.count);
  args.x = x.data, args.dtype = x.dtype;
  args.map_batch = slot.dims[0];
  args.batch = joint_batch(kernel, args.x_batch, args.map_batch);
  args.left = keep.dims[1], args.gone = source.dims[1];
  const bool sized = !size.absent();
  if (slot.dims[1] != args.count || (sized && size.dims[1] != args.count) || keep.dims[0] != args.map_batch ||
      source.dims[0] != args.map_batch)
    stop("merge_tokens: the map does not fit the operand");
  if (sized) args.size = static_cast<const float*>(size.data), args.size_batch = size.dims[0];
  args.slot = static_cast<const int32_t*>(slot.data), args.keep = static_cast<const int32_t*>(keep.data);
  args.source = static_cast<const int32_t*>(source.data);
  int64_t dims[MOST_RANK];
  memcpy(dims, x.dims, sizeof dims);
  dims[kernel.attributes.axis] = args.left;
  if (kernel.attributes.batch_axis >= 0) dims[kernel.attributes.batch_axis] = args.batch;
  const int64_t new_size[2] = {args.batch, args.left};
  args.y = kernel.output(context, 0, dims, x.rank);
  args.new_size = static_cast<float*>(kernel.output(context, 1, new_size, 2));
  call(elision_merge, args, kernel, context);
}

int32_t bytes_of(int dtype) {
  switch (dtype) {
    case ORT_UINT8: case ORT_INT8: case ORT_BOOL: return 1;
    case ORT_UINT16: case ORT_INT16: case ORT_FLOAT16: case ORT_BFLOAT16: return 2;
    case ORT_FLOAT: case ORT_INT32: case ORT_UINT32: return 4;
    default: return 8;
  }
}

void restore(const Kernel& kernel, OrtKernelContext* context) {
  const Tensor y = kernel.input(context, 0), slot = kernel.input(context, 1, 2);
  elision_restore_args args{};
  args.layout = layout_of(kernel, y, &args.y_batch, &args.left);
  args.y = y.data, args.slot = static_cast<const int32_t*>(slot.data);
  args.itemsize = bytes_of(y.dtype);
  args.map_batch = slot.dims[0], args.count = slot.dims[1];
  args.batch = joint_batch(kernel, args.y_batch, args.map_batch);
  int64_t dims[MOST_RANK];
  memcpy(dims, y.dims, sizeof dims);
  dims[kernel.attributes.axis] = args.count;
  if (kernel.attributes.batch_axis >= 0) dims[kernel.attributes.batch_axis] = args.batch;
  args.x = kernel.output(context, 0, dims, y.rank);
  call(elision_restore, args, kernel, context);
}

void attention(const Kernel& kernel, OrtKernelContext* context) {
  Tensor q = kernel.input(context, 0), k = kernel.input(context, 1), v = kernel.input(context, 2);
  Tensor mask = kernel.input(context, 3);
  const Tensor size = kernel.input(context, 4, 2), shape_of = q;
  const int64_t joined = kernel.attributes.heads;
  if (joined != 0) {  // [b, n, h * d], seen as [b, h, n, d] with strides
    for (Tensor* t : {&q, &k, &v}) {
      const int64_t heads = t == &q ? joined : kernel.attributes.kv_heads;
      if (t->rank != 3 || heads < 1 || t->dims[2] % heads != 0)
        stop("joined_attention: the operands are not [b, n, heads * d]");
      t->rank = 4, t->dims[3] = t->dims[2] / heads, t->dims[2] = t->dims[1], t->dims[1] = heads;
    }
  }
  if (q.rank < 3 || k.rank != q.rank || v.rank != q.rank)
    stop("attention: q, k and v have three axes or more, all the same number");
  if (joined == 0 && q.rank == 3 && k.dims[0] == q.dims[0]) {  // axis 0 is a batch of single heads
    for (Tensor* t : {&q, &k, &v, &mask}) {
      if (t->absent() || t->rank != 3) continue;
      memmove(t->dims + 2, t->dims + 1, 2 * sizeof t->dims[0]);
      t->dims[1] = 1, t->rank = 4;
    }
  }
  const size_t rank = q.rank;
  elision_attention_args args{};
  args.q = q.data, args.k = k.data, args.v = v.data, args.dtype = q.dtype;
  args.batch = 1;
  for (size_t a = 0; a + 3 < rank; ++a) {
    if (k.dims[a] != q.dims[a] || v.dims[a] != q.dims[a]) stop("attention: q, k and v differ in their batch axes");
    args.batch = times(args.batch, q.dims[a]);
  }
  args.heads = q.dims[rank - 3], args.kv_heads = k.dims[rank - 3];
  args.queries = q.dims[rank - 2], args.keys = k.dims[rank - 2];
  args.width = q.dims[rank - 1], args.value_width = v.dims[rank - 1];
  if (k.dims[rank - 1] != args.width || v.dims[rank - 2] != args.keys || v.dims[rank - 3] != args.kv_heads)
    stop("attention: the lengths of q, k and v do not fit together");
  const auto strides = [&](int64_t* out, int64_t heads, int64_t tokens, int64_t width) {
    out[0] = times(times(heads, tokens), width);
    out[1] = joined ? width : times(tokens, width);
    out[2] = joined ? times(heads, width) : width;
  };
  strides(args.q_stride, args.heads, args.queries, args.width);
  strides(args.k_stride, args.kv_heads, args.keys, args.width);
  strides(args.v_stride, args.kv_heads, args.keys, args.value_width);
  strides(args.out_stride, args.heads, args.queries, args.value_width);
  args.batch_per_size = 1;
  if (!size.absent()) {
    if (size.dims[1] != args.keys) stop("attention: size and keys differ in tokens");
    args.size = static_cast<const float*>(size.data), args.size_batch = size.dims[0];
    if (rank < 4 && args.size_batch != 1) stop("attention: sizes of a batch need operands with a batch axis");
    if (rank >= 4 && q.dims[0] > 0) args.batch_per_size = args.batch / q.dims[0] > 0 ? args.batch / q.dims[0] : 1;
  }
  std::vector<int64_t> offsets;
  if (!mask.absent()) {
    if (mask.rank > rank) stop("attention: the mask has more axes than q");
    const size_t lead = rank - mask.rank;
    int64_t stride = 1, strides_of[MOST_RANK] = {};
    for (size_t a = rank; a-- > lead;) {
      const int64_t length = mask.dims[a - lead];
      const int64_t full = a == rank - 1 ? args.keys : q.dims[a];
      if (length != 1 && length != full) stop("attention: the mask does not broadcast to the logits");
      strides_of[a] = length == 1 ? 0 : stride;
      stride = times(stride, length);
    }
    offsets.resize(static_cast<size_t>(args.batch));
    for (int64_t b = 0; b < args.batch; ++b) {
      int64_t rest = b, offset = 0;
      for (size_t a = rank - 3; a-- > 0;) {
        offset += rest % q.dims[a] * strides_of[a];
        rest /= q.dims[a];
      }
      offsets[static_cast<size_t>(b)] = offset;
    }
    args.mask = mask.data, args.mask_dtype = mask.dtype, args.mask_offset = offsets.data();
    for (size_t a = 0; a < 3; ++a) args.mask_stride[a] = strides_of[rank - 3 + a];
  }
  const float wish = kernel.attributes.scale;
  args.scale = wish != 0.0f ? wish : 1.0f / sqrtf(static_cast<float>(args.width > 0 ? args.width : 1));
  args.masked = MASKED, args.causal = kernel.attributes.causal != 0;
  int64_t dims[MOST_RANK];
  memcpy(dims, shape_of.dims, sizeof dims);
  dims[shape_of.rank - 1] = joined ? times(args.heads, args.value_width) : args.value_width;
  args.out = kernel.output(context, 0, dims, shape_of.rank);
  call(elision_attention, args, kernel, context);
}

// ---- what the session asks -------------------------------------------------------------------------------
const Op& as_op(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

template <class Work>
OrtStatus* guarded(const Kernel& kernel, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Problem& problem) {
    return kernel.api.create_status(problem.code, problem.text.c_str());
  } catch (const std::bad_alloc&) {
    return kernel.api.create_status(ORT_RUNTIME_EXCEPTION, "out of memory");
  }
}

OrtStatus* create(const OrtCustomOp* op, const void* api, const OrtKernelInfo* info, void** kernel) {
  const OrtTable table{static_cast<const void* const*>(api)};
  Kernel* made = new (std::nothrow) Kernel{table, &as_op(op), {}, {}};
  if (made == nullptr) return table.create_status(ORT_RUNTIME_EXCEPTION, "out of memory");
  Attributes& a = made->attributes;
  // An attribute that the node lacks keeps its default.
  const auto number = [&](const char* name, auto* out) {
    OrtStatus* status = table.attribute(info, name, out);
    if (status != nullptr) table.release(status);
  };
  number("r", &a.r), number("ratio", &a.ratio), number("prefix", &a.prefix), number("suffix", &a.suffix);
  number("heads", &a.heads), number("kv_heads", &a.kv_heads);
  number("axis", &a.axis), number("batch_axis", &a.batch_axis), number("causal", &a.causal), number("scale", &a.scale);
  number("window", &a.window), number("key_bias", &a.key_bias), number("rotary", &a.rotary);
  number("softcap", &a.softcap), number("eps", &a.eps), number("norm_offset", &a.norm_offset);
  const auto text = [&](const char* name) -> std::string {
    char found[16] = "";
    size_t size = sizeof found;
    OrtStatus* status = table.attribute(info, name, found, &size);
    if (status != nullptr) table.release(status);
    return status == nullptr ? found : "";
  };
  a.published = text("order") != "original";
  a.fn = text("fn");
  if (made->op->compute == match) {
    const char* wrong = nullptr;
    if (a.r < 0 && !(a.ratio >= 0.0f && a.ratio <= 1.0f)) wrong = "match_tokens: give r >= 0 or a ratio between 0 and 1";
    if (a.prefix < 0 || a.suffix < 0 || a.prefix > INT32_MAX || a.suffix > INT32_MAX)
      wrong = "match_tokens: prefix and suffix must not be negative";
    if (wrong != nullptr) {
      delete made;
      return table.create_status(ORT_INVALID_ARGUMENT, wrong);
    }
    if (a.r < 0) elision_fraction(a.ratio, MOST_DENOMINATOR, &a.numerator, &a.denominator);
  }
  if (made->op->prepare != nullptr) {
    OrtStatus* status = guarded(*made, [&] { made->op->prepare(*made, info); });
    if (status != nullptr) {
      delete made;
      return status;
    }
  }
  *kernel = made;
  return nullptr;
}

OrtStatus* compute(void* state, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return guarded(kernel, [&] { kernel.op->compute(kernel, context); });
}

}  // namespace

Op make(const char* name, int dtype, Types inputs, Types outputs, std::vector<bool> optional,
        void (*function)(const Kernel&, OrtKernelContext*), void (*prepare)(Kernel&, const OrtKernelInfo*)) {
  Op op{};
  op.version = 16;
  op.name = name, op.dtype = dtype, op.inputs = std::move(inputs), op.outputs = std::move(outputs);
  op.optional = std::move(optional), op.compute = function, op.prepare = prepare;
  op.GetName = [](const OrtCustomOp* o) { return as_op(o).name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const OrtCustomOp* o, size_t i) { return as_op(o).inputs[i]; };
  op.GetInputTypeCount = [](const OrtCustomOp* o) { return as_op(o).inputs.size(); };
  op.GetOutputType = [](const OrtCustomOp* o, size_t i) { return as_op(o).outputs[i]; };
  op.GetOutputTypeCount = [](const OrtCustomOp* o) { return as_op(o).outputs.size(); };
  op.GetInputCharacteristic = [](const OrtCustomOp* o, size_t i) {
    return as_op(o).optional[i] ? ORT_OPTIONAL : ORT_REQUIRED;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ORT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.KernelDestroy = [](void* state) { delete static_cast<Kernel*>(state); };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  return op;
}

namespace {

// Files have one function of a name, and call further variants of an op by its name and a number from 2 on
// (passes/onnx/lower_functions.py). So many are known here; more of them run as functions.
constexpr int MOST_VARIANTS = 8;

// The ops live as long as the library, with their names.
const Ops& ops() {
  static std::deque<std::string> names;
  static const Ops all = [] {
    Ops made;
    for (const int t : {ORT_FLOAT, ORT_FLOAT16, ORT_BFLOAT16}) {
      const int i = ORT_INT32, f = ORT_FLOAT;
      made.push_back(make("match_tokens", t, {t}, {i, i, i}, {false}, match));
      made.push_back(make("match_padded_tokens", t, {t, f}, {i, i, i}, {false, false}, match));
      made.push_back(make("mean_heads", t, {t}, {t}, {false}, mean));
      made.push_back(make("merge_tokens", t, {t, f, i, i, i}, {t, f}, {false, true, false, false, false}, merge));
      made.push_back(make("attention", t, {t, t, t, ORT_ANY_TYPE, f}, {t}, {false, false, false, true, true}, attention));
      made.push_back(
          make("joined_attention", t, {t, t, t, ORT_ANY_TYPE, f}, {t}, {false, false, false, true, true}, attention));
    }
    for (const int t : {ORT_FLOAT, ORT_UINT8, ORT_INT8, ORT_UINT16, ORT_INT16, ORT_INT32, ORT_INT64, ORT_BOOL,
                        ORT_FLOAT16, ORT_DOUBLE, ORT_UINT32, ORT_UINT64, ORT_BFLOAT16})
      made.push_back(make("restore_tokens", t, {t, ORT_INT32}, {t}, {false, false}, restore));
    add_step_ops(made);
    add_linear_ops(made);
    const size_t count = made.size();
    for (int number = 2; number <= MOST_VARIANTS; ++number) {
      for (size_t i = 0; i < count; ++i) {
        names.push_back(std::string(made[i].name) + "_" + std::to_string(number));
        made.push_back(made[i]);
        made.back().name = names.back().c_str();
      }
    }
    return made;
  }();
  return all;
}

}  // namespace
}  // namespace ort
}  // namespace elision

using namespace elision::ort;

extern "C" ELISION_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const void* api = base->GetApi(ORT_OLDEST);
  if (api == nullptr) {
    // Without the table there is not even a way to make a status; version 1 has had that function from the start.
    const OrtTable oldest{static_cast<const void* const*>(base->GetApi(1))};
    return oldest.create_status(ORT_RUNTIME_EXCEPTION, "elision's kernels need onnxruntime 1.17 or later");
  }
  const OrtTable table{static_cast<const void* const*>(api)};
  const char* wish = getenv("ELISION_ISA");
  if (wish != nullptr && *wish != '\0' && strcmp(wish, elision_variant()) != 0)
    return table.create_status(ORT_INVALID_ARGUMENT, "ELISION_ISA names no variant of elision's kernels that runs here");
  // Sessions refer to the domain as long as they live: it belongs to the library, one for all of them. A process may
  // have two copies of onnxruntime in it.
  static std::mutex guard;
  static std::vector<std::pair<const OrtApiBase*, OrtCustomOpDomain*>> domains;
  std::lock_guard<std::mutex> lock(guard);
  for (const auto& [owner, domain] : domains)
    if (owner == base) return table.add_domain(options, domain);
  OrtCustomOpDomain* domain = nullptr;
  OrtStatus* status = table.create_domain("elision", &domain);
  for (const Op& op : ops())
    if (status == nullptr) status = table.domain_add(domain, &op);
  if (status != nullptr) return status;
  domains.emplace_back(base, domain);
  return table.add_domain(options, domain);
}
