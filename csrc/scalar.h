// One value: a loss, a grad_scale, a meter's input. From a tensor of one element to what a back end reads.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "request.h"

namespace pytracker {

// The value of a tensor of one element, for a back end on `device`: read now where the tensor lies on the host, pointed
// to where it lies on `device`. Never waits for a device. `kept` receives what must outlive the launch. Throws
// InvalidValueError, naming `name`, where the value cannot be read.
Scalar scalar_of(const at::Tensor& value, const std::string& name, c10::Device device, std::vector<at::Tensor>& kept);

// Throws InvalidValueError unless statistics can be divided by a grad_scale: it is finite and above 0.
void check_divisor(double value);

// The same as scalar_of for a grad_scale. It is checked where it is on the host: on a device that would wait.
Scalar divisor_of(const at::Tensor& value, c10::Device device, std::vector<at::Tensor>& kept);

}  // namespace pytracker
