// The functions of the CUDA runtime, and the one of torch, that give the back end its streams, events and graphs. They
// are declared here, with CUDA's types left opaque, since a machine with torch's wheels need not have CUDA's headers:
// the library that has them is the one that torch has loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver.h"

struct CUevent_st;
struct CUgraph_st;
struct CUuserObject_st;

extern "C" {

int cudaStreamCreateWithFlags(CUstream_st** stream, unsigned flags);
int cudaStreamIsCapturing(CUstream_st* stream, int* status);
int cudaStreamWaitEvent(CUstream_st* stream, CUevent_st* event, unsigned flags);
int cudaEventCreateWithFlags(CUevent_st** event, unsigned flags);
int cudaEventRecord(CUevent_st* event, CUstream_st* stream);
int cudaEventRecordWithFlags(CUevent_st* event, CUstream_st* stream, unsigned flags);
int cudaEventQuery(CUevent_st* event);
int cudaEventDestroy(CUevent_st* event);
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, CUstream_st* stream);
int cudaThreadExchangeStreamCaptureMode(int* mode);
int cudaUserObjectCreate(CUuserObject_st** object, void* data, void (*destroy)(void*), unsigned references,
                         unsigned flags);
int cudaGraphRetainUserObject(CUgraph_st* graph, CUuserObject_st* object, unsigned count, unsigned flags);
int cudaGetLastError();
const char* cudaGetErrorString(int error);

// CUDA 12 has the first. What CUDA 13 calls by the shorter name takes one argument more.
__attribute__((weak)) int cudaStreamGetCaptureInfo_v2(CUstream_st* stream, int* status, unsigned long long* id,
                                                      CUgraph_st** graph, const void* const** dependencies,
                                                      size_t* count);
__attribute__((weak)) int cudaStreamGetCaptureInfo(CUstream_st* stream, int* status, unsigned long long* id,
                                                   CUgraph_st** graph, const void* const** dependencies,
                                                   const void** edges, size_t* count);

// torch's C interface: the stream that work on a device goes to.
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

}  // extern "C"

namespace pytracker::cuda {

constexpr unsigned kNonBlocking = 1;                  // cudaStreamNonBlocking
constexpr unsigned kDisableTiming = 2;                // cudaEventDisableTiming
constexpr unsigned kRecordExternal = 1;               // cudaEventRecordExternal
constexpr int kWithinDevice = 3;                      // cudaMemcpyDeviceToDevice
constexpr int kRelaxed = 2;                           // cudaStreamCaptureModeRelaxed
constexpr unsigned kNoDestructorSync = 1, kMove = 1;  // of user objects

// Lets the thread do what must not be part of a capture, while one is going on.
class OutsideOfCaptures {
 public:
  OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideOfCaptures(const OutsideOfCaptures&) = delete;
  OutsideOfCaptures& operator=(const OutsideOfCaptures&) = delete;

 private:
  int mode_ = kRelaxed;
};

}  // namespace pytracker::cuda
