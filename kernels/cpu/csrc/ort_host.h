// What every op needs of ONNX Runtime: operands, results, attributes, its threads, and the record that describes the op.
#pragma once
#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

#include "elision.h"
#include "ort_abi.h"

namespace elision {
namespace ort {

constexpr size_t MOST_RANK = 8;

// A sentence, thrown inside a compute call and handed to the session as a status.
struct Problem {
  int code;
  std::string text;
};
[[noreturn]] inline void stop(const std::string& text, int code = ORT_INVALID_ARGUMENT) { throw Problem{code, text}; }

struct Tensor {
  void* data = nullptr;  // null: absent
  int dtype = 0;
  size_t rank = 0;
  int64_t dims[MOST_RANK] = {};
  bool absent() const { return dtype == 0; }
};

// Lengths of a tensor without elements may be anything.
inline int64_t times(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) stop("elision: the operands' lengths do not fit together");
  return result;
}

// Those of every op; one that a node lacks keeps its default.
struct Attributes {
  int64_t r = -1, prefix = 0, suffix = 0, axis = 0, batch_axis = 0, causal = 0, heads = 0, kv_heads = 0;
  int64_t window = 0, key_bias = 0, rotary = 0;
  float ratio = -1.0f, scale = 0.0f, softcap = 0.0f, eps = 1e-6f, norm_offset = 0.0f;
  std::string fn;
  int64_t numerator = 0, denominator = 0;  // of ratio; 0: it is no share
  bool published = true;
};

struct Kernel;

// One op for one element type.
struct Op : OrtCustomOp {
  const char* name;
  int dtype;
  std::vector<int> inputs, outputs;  // element types
  std::vector<bool> optional;
  void (*compute)(const Kernel&, OrtKernelContext*);
  void (*prepare)(Kernel&, const OrtKernelInfo*);  // once, when the kernel is made; or null
};

struct Kernel {
  OrtTable api;
  const Op* op;
  Attributes attributes;
  std::shared_ptr<void> own;  // what `prepare` keeps

  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    api.release(status);
    stop(std::string(op->name) + ": onnxruntime refused a call", ORT_RUNTIME_EXCEPTION);
  }

  Tensor tensor(const OrtValue* value) const {
    Tensor t;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api.type_and_shape(value, &info));
    OrtStatus* status = api.element_type(info, &t.dtype);
    if (status == nullptr) status = api.rank(info, &t.rank);
    if (status == nullptr && t.rank <= MOST_RANK) status = api.dims(info, t.dims, t.rank);
    api.release(info);
    check(status);
    if (t.rank > MOST_RANK) stop(std::string(op->name) + ": operands have at most 8 axes");
    check(api.data(const_cast<OrtValue*>(value), &t.data));
    return t;
  }

  Tensor input(OrtKernelContext* context, size_t index, size_t rank = 0) const {
    size_t count = 0;
    check(api.input_count(context, &count));
    const OrtValue* value = nullptr;
    if (index < count) check(api.input(context, index, &value));
    if (value == nullptr) return {};
    const Tensor t = tensor(value);
    if (rank != 0 && t.rank != rank)
      stop(std::string(op->name) + ": operand " + std::to_string(index) + " has " + std::to_string(t.rank) +
           " axes, not " + std::to_string(rank));
    return t;
  }

  void* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank) const {
    OrtValue* value = nullptr;
    void* data = nullptr;
    check(api.output(context, index, dims, rank, &value));
    check(api.data(value, &data));
    return data;
  }
};

struct Runner {
  const Kernel* kernel;
  OrtKernelContext* context;

  static void run(void* self, elision_task task, void* data, size_t count) {
    const Runner& r = *static_cast<Runner*>(self);
    if (count == 1) return task(data, 0);
    if (count == 0) return;
    OrtStatus* status = r.kernel->api.parallel_for(r.context, task, count, 0, data);
    if (status == nullptr) return;
    r.kernel->api.release(status);
    for (size_t i = 0; i < count; ++i) task(data, i);  // no pool to be had: tasks may be done twice
  }
};

template <class Args>
void call(int (*function)(const Args*, const elision_runner*, char*, size_t), const Args& args, const Kernel& kernel,
          OrtKernelContext* context) {
  Runner own{&kernel, context};
  const elision_runner runner{Runner::run, &own};
  char error[256] = "";
  if (function(&args, &runner, error, sizeof error) != 0) stop(error);
}

using Ops = std::vector<Op>;
using Types = std::vector<int>;
// An op by name, for the element type `dtype`; `optional`: by operand.
Op make(const char* name, int dtype, Types inputs, Types outputs, std::vector<bool> optional,
        void (*function)(const Kernel&, OrtKernelContext*), void (*prepare)(Kernel&, const OrtKernelInfo*) = nullptr);

// The families of ops, one file each.
void add_step_ops(Ops& all);
void add_linear_ops(Ops& all);

}  // namespace ort
}  // namespace elision
