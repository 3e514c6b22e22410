// What we use of ONNX Runtime's C interface, declared by ourselves: no package registry carries its headers.
//
// The interface is append-only: functions are known by their place in OrtApi, and OrtCustomOp only grows at its end.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

constexpr uint32_t ORT_OLDEST = 17;  // the first API version with every function below

// OrtApi as a table; a function's place is its name here.
struct OrtTable {
  const void* const* at;

  template <class F>
  F get(int place) const {
    return reinterpret_cast<F>(const_cast<void*>(at[place]));
  }
  OrtStatus* create_status(int code, const char* text) const {
    return get<OrtStatus* (*)(int, const char*)>(0)(code, text);
  }
  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** out) const {
    return get<OrtStatus* (*)(const char*, OrtCustomOpDomain**)>(26)(name, out);
  }
  OrtStatus* domain_add(OrtCustomOpDomain* domain, const struct OrtCustomOp* op) const {
    return get<OrtStatus* (*)(OrtCustomOpDomain*, const struct OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return get<OrtStatus* (*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* data(OrtValue* value, void** out) const {
    return get<OrtStatus* (*)(OrtValue*, void**)>(51)(value, out);
  }
  OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* out) const {
    return get<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int*)>(60)(info, out);
  }
  OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* out) const {
    return get<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, out);
  }
  OrtStatus* dims(const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t count) const {
    return get<OrtStatus* (*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
  }
  OrtStatus* type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** out) const {
    return get<OrtStatus* (*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, out);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float* out) const {
    return get<OrtStatus* (*)(const OrtKernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* out) const {
    return get<OrtStatus* (*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, char* out, size_t* size) const {
    return get<OrtStatus* (*)(const OrtKernelInfo*, const char*, char*, size_t*)>(87)(info, name, out, size);
  }
  OrtStatus* input_count(const OrtKernelContext* context, size_t* out) const {
    return get<OrtStatus* (*)(const OrtKernelContext*, size_t*)>(88)(context, out);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** out) const {
    return get<OrtStatus* (*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, out);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, OrtValue** out) const {
    return get<OrtStatus* (*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(context, index, dims,
                                                                                                 rank, out);
  }
  void release(OrtStatus* status) const { get<void (*)(OrtStatus*)>(93)(status); }
  void release(OrtTensorTypeAndShapeInfo* info) const { get<void (*)(OrtTensorTypeAndShapeInfo*)>(99)(info); }
  OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** out) const {
    return get<OrtStatus* (*)(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(info, index, is_constant, out);
  }
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*task)(void*, size_t), size_t total, size_t batches,
                          void* data) const {
    return get<OrtStatus* (*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, task, total, batches, data);
  }
};

constexpr int ORT_INVALID_ARGUMENT = 2, ORT_RUNTIME_EXCEPTION = 6;
constexpr int ORT_ANY_TYPE = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_UINT16 = 4, ORT_INT16 = 5,
              ORT_INT32 = 6, ORT_INT64 = 7, ORT_BOOL = 9, ORT_FLOAT16 = 10, ORT_DOUBLE = 11, ORT_UINT32 = 12,
              ORT_UINT64 = 13, ORT_BFLOAT16 = 16;
constexpr int ORT_REQUIRED = 0, ORT_OPTIONAL = 1;

// Version 16 of the struct: it ends with the calls that return a status.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const void* api, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const void* api, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
};
