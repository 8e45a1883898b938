#include "launch.h"

#include <algorithm>

#include "kernel_arguments.h"

namespace pytracker::cuda {
namespace {

template <typename Parameters>
void launch(const char* name, Function function, int32_t blocks, int32_t threads, Parameters& parameters,
            Stream stream) {
  void* arguments[] = {&parameters};
  check(driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr), name);
}

Work work_of(const Table& table, const void* device_table, const Launch& part) {
  const std::byte* bytes = static_cast<const std::byte*>(device_table);
  Work work = {};
  work.tensors = reinterpret_cast<const TensorEntry*>(bytes);
  work.blocks = reinterpret_cast<const BlockEntry*>(bytes + table.blocks_offset);
  work.strided = reinterpret_cast<const Strided*>(bytes + table.strided_offset);
  work.share = table.share;
  work.first_block = part.first_block;
  work.first_tensor = part.first_tensor;
  return work;
}

template <int kPointers>
void launch_step(Function function, const Step& step, const Launch& part, const void* const* gradients, Stream stream) {
  StepParameters<kPointers> parameters;
  parameters.step = step;
  std::copy_n(gradients + part.first_tensor, part.n_tensors, parameters.gradients);
  launch("gradients_kernel", function, part.n_blocks, kThreads, parameters, stream);
}

template <int kPointers>
void launch_scale(Function function, const Work& work, const Launch& part, void* const* gradients,
                  const double* factors, int64_t stride, Stream stream) {
  ScaleParameters<kPointers> parameters;
  parameters.work = work;
  parameters.factors = factors;
  parameters.stride = stride;
  std::copy_n(gradients + part.first_tensor, part.n_tensors, parameters.gradients);
  launch("scale_kernel", function, part.n_blocks, kThreads, parameters, stream);
}

}  // namespace

void probe(const Kernels& kernels, Stream stream) {
  MeterParameters parameters = {};
  launch("update_meters_kernel", kernels.update_meters, 1, 1, parameters, stream);
}

void gradients(const Kernels& kernels, const StepRequest& request, const Table& table, const void* device_table,
               void* workspace, void* tickets, Stream stream) {
  Step step = {};
  std::byte* space = static_cast<std::byte*>(workspace);
  step.partials = reinterpret_cast<double*>(space);
  step.totals = reinterpret_cast<double*>(space + table.totals_offset);
  step.tickets = static_cast<uint32_t*>(tickets);
  step.n_tensors = static_cast<int32_t>(request.layouts->tensors.size());
  step.n_totals = table.n_totals;
  step.n_scalars = static_cast<int32_t>(request.n_scalars);
  step.row = request.row;
  step.grad_scale = request.grad_scale;
  step.decision = request.decision;
  std::copy_n(request.scalars, request.n_scalars, step.scalars);

  for (const Launch& part : table.launches) {
    step.work = work_of(table, device_table, part);
    const auto kernel = [&](const KernelsOfSize& of) { return request.extras ? of.with_extras : of.gradients; };
    if (part.n_tensors <= kFewPointers)
      launch_step<kFewPointers>(kernel(kernels.few), step, part, request.gradients, stream);
    else if (part.n_tensors <= kSomePointers)
      launch_step<kSomePointers>(kernel(kernels.some), step, part, request.gradients, stream);
    else
      launch_step<kManyPointers>(kernel(kernels.many), step, part, request.gradients, stream);
  }
}

void scale(const Kernels& kernels, const Table& table, const void* device_table, void* const* gradients,
           const double* factors, int64_t stride, Stream stream) {
  for (const Launch& part : table.launches) {
    const Work work = work_of(table, device_table, part);
    if (part.n_tensors <= kFewPointers)
      launch_scale<kFewPointers>(kernels.few.scale, work, part, gradients, factors, stride, stream);
    else if (part.n_tensors <= kSomePointers)
      launch_scale<kSomePointers>(kernels.some.scale, work, part, gradients, factors, stride, stream);
    else
      launch_scale<kManyPointers>(kernels.many.scale, work, part, gradients, factors, stride, stream);
  }
}

void decide(const Kernels& kernels, const Decision& decision, const RowTarget& row, int64_t n_tensors, Stream stream) {
  DecideParameters parameters = {decision, row, n_tensors};
  launch("decide_kernel", kernels.decide, 1, 1, parameters, stream);
}

void update_meters(const Kernels& kernels, double* state, const Scalar* values, const Scalar* weights, int64_t count,
                   Stream stream) {
  for (int64_t done = 0; done < count; done += kMaxScalars) {
    MeterParameters parameters;
    parameters.state = state;
    parameters.count = static_cast<int32_t>(std::min<int64_t>(count - done, kMaxScalars));
    std::copy_n(values + done, parameters.count, parameters.values);
    std::copy_n(weights + done, parameters.count, parameters.weights);
    launch("update_meters_kernel", kernels.update_meters, 1, kMaxScalars, parameters, stream);
  }
}

}  // namespace pytracker::cuda
