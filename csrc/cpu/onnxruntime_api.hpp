// The part of ONNX Runtime's C API that the custom op uses.
//
// ONNX Runtime's wheels come without its header. Its ABI is stable: the function table of a version only ever grows at
// its end, so an entry never moves. The entries in use are listed here by position; the others are unnamed slots.
// Functions and fields have ONNX Runtime's names; see its documentation. If its header is installed,
// csrc/tests/check_onnxruntime_api.cpp compares the two.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastcam::onnxruntime {

// Since ONNX Runtime 1.20.
constexpr std::uint32_t api_version = 20;

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorTypeAndShapeInfo;
struct Allocator;
struct CustomOp;

enum ErrorCode : int { fail = 1, invalid_argument = 2 };
enum ElementType : int { float_tensor = 1 };
enum Characteristic : int { required = 0, optional = 1 };
enum MemoryType : int { default_memory = 0 };

// Every function that returns a Status returns null for success.
using Slot = void (*)();

struct Api {
    Status* (*CreateStatus)(ErrorCode code, const char* message);
    Slot slots_1_25[25];
    Status* (*CreateCustomOpDomain)(const char* domain, CustomOpDomain** out);
    Status* (*CustomOpDomain_Add)(CustomOpDomain* domain, const CustomOp* op);
    Status* (*AddCustomOpDomain)(SessionOptions* options, CustomOpDomain* domain);
    Slot slots_29_50[22];
    Status* (*GetTensorMutableData)(Value* value, void** out);
    Slot slots_52_60[9];
    Status* (*GetDimensionsCount)(const TensorTypeAndShapeInfo* info, std::size_t* out);
    Status* (*GetDimensions)(const TensorTypeAndShapeInfo* info, std::int64_t* dimensions, std::size_t count);
    Slot slots_63_64[2];
    Status* (*GetTensorTypeAndShape)(const Value* value, TensorTypeAndShapeInfo** out);
    Slot slots_66_74[9];
    Status* (*AllocatorAlloc)(Allocator* allocator, std::size_t bytes, void** out);
    Status* (*AllocatorFree)(Allocator* allocator, void* memory);
    Slot slots_77_85[9];
    Status* (*KernelInfoGetAttribute_int64)(const KernelInfo* info, const char* name, std::int64_t* out);
    Slot slots_87_89[3];
    Status* (*KernelContext_GetInput)(const KernelContext* context, std::size_t index, const Value** out);
    Status* (*KernelContext_GetOutput)(KernelContext* context, std::size_t index, const std::int64_t* dimensions,
                                       std::size_t count, Value** out);
    Slot slot_92;
    void (*ReleaseStatus)(Status* status);
    Slot slots_94_98[5];
    void (*ReleaseTensorTypeAndShapeInfo)(TensorTypeAndShapeInfo* info);
    Slot slots_100_131[32];
    void (*ReleaseAllocator)(Allocator* allocator);
    Slot slots_133_273[141];
    Status* (*KernelContext_ParallelFor)(const KernelContext* context, void (*task)(void* data, std::size_t index),
                                         std::size_t tasks, std::size_t batches, void* data);
    Slot slots_275_277[3];
    Status* (*KernelInfoGetAllocator)(const KernelInfo* info, MemoryType type, Allocator** out);
};

struct ApiBase {
    // Null if this ONNX Runtime is older than the version.
    const Api* (*GetApi)(std::uint32_t version);
    const char* (*GetVersionString)();
};

struct CustomOp {
    std::uint32_t version;
    Slot CreateKernel;
    const char* (*GetName)(const CustomOp* op);
    const char* (*GetExecutionProviderType)(const CustomOp* op);
    ElementType (*GetInputType)(const CustomOp* op, std::size_t index);
    std::size_t (*GetInputTypeCount)(const CustomOp* op);
    ElementType (*GetOutputType)(const CustomOp* op, std::size_t index);
    std::size_t (*GetOutputTypeCount)(const CustomOp* op);
    Slot KernelCompute;
    void (*KernelDestroy)(void* kernel);
    Characteristic (*GetInputCharacteristic)(const CustomOp* op, std::size_t index);
    Characteristic (*GetOutputCharacteristic)(const CustomOp* op, std::size_t index);
    MemoryType (*GetInputMemoryType)(const CustomOp* op, std::size_t index);
    Slot variadic[4];
    Status* (*CreateKernelV2)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel);
    Status* (*KernelComputeV2)(void* kernel, KernelContext* context);
    Slot InferOutputShapeFn;
    int (*GetStartVersion)(const CustomOp* op);
    int (*GetEndVersion)(const CustomOp* op);
    Slot in_place_and_aliases[4];
};

#define FASTCAM_AT(type, field, place) \
    static_assert(offsetof(type, field) == (place) * sizeof(Slot), #type "::" #field " has another place")
FASTCAM_AT(Api, CreateStatus, 0);
FASTCAM_AT(Api, CreateCustomOpDomain, 26);
FASTCAM_AT(Api, CustomOpDomain_Add, 27);
FASTCAM_AT(Api, AddCustomOpDomain, 28);
FASTCAM_AT(Api, GetTensorMutableData, 51);
FASTCAM_AT(Api, GetDimensionsCount, 61);
FASTCAM_AT(Api, GetDimensions, 62);
FASTCAM_AT(Api, GetTensorTypeAndShape, 65);
FASTCAM_AT(Api, AllocatorAlloc, 75);
FASTCAM_AT(Api, AllocatorFree, 76);
FASTCAM_AT(Api, KernelInfoGetAttribute_int64, 86);
FASTCAM_AT(Api, KernelContext_GetInput, 90);
FASTCAM_AT(Api, KernelContext_GetOutput, 91);
FASTCAM_AT(Api, ReleaseStatus, 93);
FASTCAM_AT(Api, ReleaseTensorTypeAndShapeInfo, 99);
FASTCAM_AT(Api, ReleaseAllocator, 132);
FASTCAM_AT(Api, KernelContext_ParallelFor, 274);
FASTCAM_AT(Api, KernelInfoGetAllocator, 278);
FASTCAM_AT(CustomOp, KernelDestroy, 9);
FASTCAM_AT(CustomOp, CreateKernelV2, 17);
FASTCAM_AT(CustomOp, KernelComputeV2, 18);
FASTCAM_AT(CustomOp, GetStartVersion, 20);
static_assert(sizeof(CustomOp) == 26 * sizeof(Slot), "CustomOp has another size");
#undef FASTCAM_AT

}  // namespace fastcam::onnxruntime
