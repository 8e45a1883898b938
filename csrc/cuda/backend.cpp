// The CUDA back end: torch's streams and memory for the launchers of launch.h.
#include "../backend.h"

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <vector>

#include "launch.h"

namespace pytracker::cuda {
namespace {

using c10::cuda::CUDACachingAllocator::recordStream;

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(c10::Device device) : device_(device) {}

  void step(const StepRequest& request) override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto stream = c10::cuda::getCurrentCUDAStream(device_.index());
    prepare(*request.layouts, stream);
    C10_CUDA_CHECK(gradients(request, plan_->table, plan_->device_table.get(), plan_->workspace.get(), stream));
  }

  bool capturing() const override {
    const c10::cuda::CUDAGuard guard(device_);
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }

  void scale(const Layouts& layouts, void* const* gradients, const double* factor) override {
    const c10::cuda::CUDAGuard guard(device_);
    const auto stream = c10::cuda::getCurrentCUDAStream(device_.index());
    prepare(layouts, stream);
    C10_CUDA_CHECK(cuda::scale(plan_->table, plan_->device_table.get(), gradients, factor, stream));
  }

  void update_meters(double* state, const Scalar* values, const Scalar* weights, int64_t count) override {
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(
        cuda::update_meters(state, values, weights, count, c10::cuda::getCurrentCUDAStream(device_.index())));
  }

 private:
  // What the device keeps for one version of the layouts.
  struct Plan {
    Table table;
    c10::DataPtr device_table, workspace;
    bool captured = false;  // a graph holds the pointers
  };

  // Makes plan_ fit the layouts, and safe to use on `stream`.
  void prepare(const Layouts& layouts, c10::cuda::CUDAStream stream) {
    const bool captured = capturing();
    if (!plan_ || version_ != layouts.version) {
      if (plan_ && plan_->captured) kept_for_graphs_.push_back(*std::move(plan_));
      plan_ = upload(build_table(layouts));
      version_ = layouts.version;
      stream_.reset();
    }
    plan_->captured |= captured;
    if (stream_ == stream) return;

    // The workspace serves one launch at a time, so a new stream waits for the old one: on the device, not here. A
    // capture stands outside of that order: what it records runs later, after what the user makes it wait for.
    if (stream_ && !captured && !is_capturing(*stream_)) {
      cudaEvent_t event = nullptr;
      C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      const cudaError_t recorded = cudaEventRecord(event, *stream_);
      const cudaError_t waits = recorded == cudaSuccess ? cudaStreamWaitEvent(stream, event, 0) : recorded;
      C10_CUDA_CHECK(cudaEventDestroy(event));  // the driver keeps it until it is done
      C10_CUDA_CHECK(waits);
    }
    recordStream(plan_->device_table, stream);
    recordStream(plan_->workspace, stream);
    stream_ = stream;
  }

  // Copies a table to the device, and waits for that: only where layouts have changed. It has a stream of its own, so
  // that the wait is for these few kilobytes and not for the training, and a capture may be going on.
  Plan upload(Table table) const {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_.index()));
    const auto stream = guard.current_stream();
    auto* allocator = c10::cuda::CUDACachingAllocator::get();
    c10::DataPtr device_table = allocator->allocate(table.bytes.size());
    c10::DataPtr workspace = allocator->allocate(table.workspace_bytes);
    C10_CUDA_CHECK(
        cudaMemcpyAsync(device_table.get(), table.bytes.data(), table.bytes.size(), cudaMemcpyHostToDevice, stream));
    C10_CUDA_CHECK(cudaMemsetAsync(workspace.get(), 0, table.workspace_bytes, stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream));
    return {std::move(table), std::move(device_table), std::move(workspace)};
  }

  static bool is_capturing(c10::cuda::CUDAStream stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  c10::Device device_;
  std::optional<Plan> plan_;
  uint64_t version_ = 0;
  std::optional<c10::cuda::CUDAStream> stream_;  // the last that used the plan
  std::vector<Plan> kept_for_graphs_;            // of earlier layouts: a replay still reads them
};

std::unique_ptr<Backend> make(c10::Device device) { return std::make_unique<CudaBackend>(device); }

const bool registered = register_backend(c10::DeviceType::CUDA, make);

}  // namespace
}  // namespace pytracker::cuda
