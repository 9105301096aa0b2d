// Compares onnxruntime_api.hpp with ONNX Runtime's own header, if installed (Debian: libonnxruntime-dev).
// Compiling it is the test.
#include <onnxruntime_c_api.h>

#include "onnxruntime_api.hpp"

namespace ours = fastcam::onnxruntime;

#define SAME(field) static_assert(offsetof(OrtApi, field) == offsetof(ours::Api, field), #field)
SAME(CreateStatus);
SAME(CreateCustomOpDomain);
SAME(CustomOpDomain_Add);
SAME(AddCustomOpDomain);
SAME(GetTensorMutableData);
SAME(GetDimensionsCount);
SAME(GetDimensions);
SAME(GetTensorTypeAndShape);
SAME(AllocatorAlloc);
SAME(AllocatorFree);
SAME(KernelInfoGetAttribute_int64);
SAME(KernelContext_GetInput);
SAME(KernelContext_GetOutput);
SAME(ReleaseStatus);
SAME(ReleaseTensorTypeAndShapeInfo);
SAME(ReleaseAllocator);
SAME(KernelContext_ParallelFor);
SAME(KernelInfoGetAllocator);
#undef SAME

#define SAME(field) static_assert(offsetof(OrtCustomOp, field) == offsetof(ours::CustomOp, field), #field)
SAME(version);
SAME(CreateKernel);
SAME(GetName);
SAME(GetExecutionProviderType);
SAME(GetInputType);
SAME(GetInputTypeCount);
SAME(GetOutputType);
SAME(GetOutputTypeCount);
SAME(KernelCompute);
SAME(KernelDestroy);
SAME(GetInputCharacteristic);
SAME(GetOutputCharacteristic);
SAME(GetInputMemoryType);
SAME(CreateKernelV2);
SAME(KernelComputeV2);
SAME(InferOutputShapeFn);
SAME(GetStartVersion);
SAME(GetEndVersion);
#undef SAME

static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ours::ApiBase, GetApi));
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(ours::ApiBase, GetVersionString));
static_assert(int{ORT_FAIL} == ours::fail && int{ORT_INVALID_ARGUMENT} == ours::invalid_argument);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT} == ours::float_tensor);
static_assert(int{INPUT_OUTPUT_REQUIRED} == ours::required && int{INPUT_OUTPUT_OPTIONAL} == ours::optional);
static_assert(int{OrtMemTypeDefault} == ours::default_memory);
static_assert(ORT_API_VERSION >= ours::api_version, "this header is older than the API in use");

int main() { return 0; }
