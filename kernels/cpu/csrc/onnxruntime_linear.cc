// The products in ONNX Runtime. A weight that is a constant of the session is packed in the first call, which knows
// which operands there are and has threads; any other one in every call.
#include <string.h>

#include <atomic>
#include <mutex>

#include "ort_host.h"

namespace elision {
namespace ort {
namespace {

struct Weight {
  int64_t bits = 0, group = 0;
  int64_t channels = 0, width = 0, size = 0;
  void* packed = nullptr;

  Weight() = default;
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
  ~Weight() {
    if (packed != nullptr) elision_free_weight(packed);
  }
};

constexpr size_t WEIGHT = 1, SCALES = 2, ZEROS = 3, PARTS = 4;

// What a node keeps.
struct Own {
  int64_t bits = 0, group = 0, k = 0;  // bits 0: float weights
  bool constant[PARTS] = {};
  std::mutex guard;
  Weight weight;  // once `ready`
  std::atomic<bool> ready{false};
  bool few() const { return bits == 4 || bits == 8; }
};

void pack(const Kernel& kernel, const Tensor& weight, const Tensor& scales, const Tensor& zeros, int64_t width,
          const elision_runner& runner, Weight* to) {
  const std::string name = kernel.op->name;
  elision_pack_args args{};
  args.bits = static_cast<int32_t>(to->bits), args.width = width, args.channels = weight.dims[0];
  args.weight = weight.data, args.weight_dtype = weight.dtype;
  if (to->bits == 4 || to->bits == 8) {
    if (to->group < 16) stop(name + ": groups have at least 16 columns");
    const int64_t groups = width / to->group + (width % to->group != 0);
    if (weight.dtype != ORT_UINT8 || weight.rank != 3 || weight.dims[1] != groups ||
        weight.dims[2] != times(to->group, to->bits) / 8)
      stop(name + ": the weight does not fit " + std::to_string(width) + " columns in groups of " +
           std::to_string(to->group));
    for (const Tensor* t : {&scales, &zeros})
      if (!(t == &zeros && t->absent()) && (t->rank != 2 || t->dims[0] != weight.dims[0] || t->dims[1] != groups))
        stop(name + ": scales and zeros do not fit the weight");
    args.group = to->group, args.scales = scales.data, args.scale_dtype = scales.dtype;
    args.zeros = zeros.data, args.zero_dtype = zeros.dtype;
  } else {
    if (weight.rank != 2 || weight.dims[1] != width) stop(name + ": the weight does not fit the operand");
    args.bits = weight.dtype == ORT_FLOAT ? 32 : 16;
  }
  to->channels = args.channels, to->width = width;
  to->size = elision_packed_bytes(&args);
  if (to->size == 0) stop(name + ": there is no kernel for a weight of this type");
  if (to->packed == nullptr) to->packed = elision_weight_memory(static_cast<size_t>(to->size));
  if (to->packed == nullptr) stop(name + ": out of memory", ORT_RUNTIME_EXCEPTION);
  args.packed = to->packed;
  char error[256] = "";
  if (elision_pack(&args, &runner, error, sizeof error) != 0) stop(error);
}

void prepare(Kernel& kernel, const OrtKernelInfo* info) {
  auto own = std::make_shared<Own>();
  const auto number = [&](const char* name, int64_t* out) {
    OrtStatus* status = kernel.api.attribute(info, name, out);
    if (status != nullptr) kernel.api.release(status);
  };
  number("bits", &own->bits), number("group", &own->group), number("k", &own->k);
  for (size_t i = WEIGHT; i < PARTS; ++i) {
    int constant = 0;
    const OrtValue* value = nullptr;
    OrtStatus* status = kernel.api.constant_input(info, i, &constant, &value);
    if (status != nullptr) kernel.api.release(status);
    own->constant[i] = status == nullptr && constant != 0;
  }
  kernel.own = own;
}

// The node's packed weight, or one made for this call in `*own_call`.
const Weight& weight_of(const Kernel& kernel, OrtKernelContext* context, int64_t width, Weight* own_call) {
  Own& own = *static_cast<Own*>(kernel.own.get());
  if (own.ready.load(std::memory_order_acquire)) return own.weight;
  Tensor parts[PARTS];
  bool constant = true;
  for (size_t i = WEIGHT; i < (own.few() ? PARTS : SCALES); ++i) {
    parts[i] = kernel.input(context, i);
    constant = constant && (own.constant[i] || parts[i].absent());
  }
  Runner host{&kernel, context};
  const elision_runner runner{Runner::run, &host};
  own_call->bits = own.bits, own_call->group = own.group;
  if (!constant) {
    pack(kernel, parts[WEIGHT], parts[SCALES], parts[ZEROS], width, runner, own_call);
    return *own_call;
  }
  std::lock_guard<std::mutex> lock(own.guard);
  if (!own.ready.load(std::memory_order_relaxed)) {
    own.weight.bits = own.bits, own.weight.group = own.group;
    pack(kernel, parts[WEIGHT], parts[SCALES], parts[ZEROS], width, runner, &own.weight);
    own.ready.store(true, std::memory_order_release);
  }
  return own.weight;
}

const float* vector(const Kernel& kernel, OrtKernelContext* context, size_t index, int64_t length) {
  const Tensor t = kernel.input(context, index);
  if (t.absent()) return nullptr;
  if (t.rank != 1 || t.dims[0] != length)
    stop(std::string(kernel.op->name) + ": operand " + std::to_string(index) + " is no vector of " + std::to_string(length));
  return static_cast<const float*>(t.data);
}

// bias: where it stands among the operands; norm: 0, or where that stands. spread: whether that is put out as well.
void product(const Kernel& kernel, OrtKernelContext* context, size_t bias, size_t norm, bool spread = false) {
  const Tensor x = kernel.input(context, 0);
  if (x.rank < 1) stop(std::string(kernel.op->name) + ": x has no columns");
  elision_linear_args args{};
  args.x = x.data, args.dtype = x.dtype, args.width = x.dims[x.rank - 1], args.rows = 1;
  for (size_t a = 0; a + 1 < x.rank; ++a) args.rows = times(args.rows, x.dims[a]);
  int64_t dims[MOST_RANK];
  memcpy(dims, x.dims, sizeof dims);
  if (args.rows == 0 && norm == 0) {  // a weight that no row has asked for yet need not be packed
    const Tensor weight = kernel.input(context, WEIGHT);
    dims[x.rank - 1] = weight.dims[0];
    kernel.output(context, 0, dims, x.rank);
    return;
  }
  Weight own_call;
  const Weight& weight = weight_of(kernel, context, args.width, &own_call);
  args.packed = weight.packed, args.packed_bytes = weight.size, args.channels = weight.channels;
  args.bias = vector(kernel, context, bias, args.channels);
  if (norm == 0) {
    dims[x.rank - 1] = args.channels;
    args.out = kernel.output(context, 0, dims, x.rank);
  } else {
    args.norm = vector(kernel, context, norm, args.width);
    args.eps = kernel.attributes.eps, args.norm_offset = kernel.attributes.norm_offset;
    args.k = dims[x.rank - 1] = static_cast<const Own*>(kernel.own.get())->k;
    if (args.k < 1 || args.k > args.channels)
      stop("linear_topk: k is between 1 and " + std::to_string(args.channels) + ", not " + std::to_string(args.k));
    args.values = static_cast<float*>(kernel.output(context, 0, dims, x.rank));
    args.indices = static_cast<int64_t*>(kernel.output(context, 1, dims, x.rank));
    dims[x.rank - 1] = 2;
    if (spread) args.spread = static_cast<float*>(kernel.output(context, 2, dims, x.rank));
    if (args.rows == 0) return;  // the address of nothing may be null, which would ask for the whole product
  }
  call(elision_linear, args, kernel, context);
}

void nbits(const Kernel& kernel, OrtKernelContext* context) { product(kernel, context, 4, 0); }
void rows(const Kernel& kernel, OrtKernelContext* context) { product(kernel, context, 2, 0); }
void topk(const Kernel& kernel, OrtKernelContext* context) { product(kernel, context, 4, 5); }
void spread(const Kernel& kernel, OrtKernelContext* context) { product(kernel, context, 4, 5, true); }

}  // namespace

void add_linear_ops(Ops& all) {
  for (const int t : {ORT_FLOAT, ORT_FLOAT16, ORT_BFLOAT16}) {
    const int any = ORT_ANY_TYPE, f = ORT_FLOAT;
    all.push_back(make("linear_nbits", t, {t, ORT_UINT8, any, any, f}, {t}, {false, false, false, true, true}, nbits, prepare));
    all.push_back(make("linear_rows", t, {t, any, f}, {t}, {false, false, true}, rows, prepare));
    all.push_back(make("linear_topk", t, {t, any, any, any, f, f}, {f, ORT_INT64}, {false, false, true, true, true, true},
                       topk, prepare));
    all.push_back(make("linear_spread", t, {t, any, any, any, f, f}, {f, ORT_INT64, f},
                       {false, false, true, true, true, true}, spread, prepare));
  }
}

}  // namespace ort
}  // namespace elision
