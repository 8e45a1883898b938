// DTensors as C++ sees them: what of one lies on this rank, and whether a gradient is spread as its parameter is.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"

struct _object;

namespace pytracker {

// The piece of a DTensor that lies on this rank (FSDP2 and tensor parallel hand out gradients of this kind), or what a
// collective that has not been waited for will have given. Nothing where the tensor is of another subclass.
std::optional<at::Tensor> local_piece(const at::Tensor& tensor);

// The name of a tensor's Python class.
std::string type_name(const at::Tensor& tensor);

// A value as this rank has it whole, of a tensor subclass. Throws InvalidValueError, naming `name`, where it has not.
at::Tensor whole_value(const at::Tensor& tensor, const std::string& name);

// Remembers the placement in which the gradient of a parameter was first found.
class Placement {
 public:
  // Whether `gradient` lies on the ranks as `parameter` does, so that its local piece is a piece of the whole gradient.
  // A partial sum is not: its whole is the sum over ranks. Costs two attributes where the placement is the one known.
  bool is_that_of(const at::Tensor& parameter, const at::Tensor& gradient);

 private:
  std::shared_ptr<struct _object> known_;
};

// The local pieces of gradients once they lie as their parameters do. Collectives, the same on every rank: one for all
// partial sums of a mesh dimension and dtype.
std::vector<at::Tensor> redistributed(const std::vector<at::Tensor>& parameters,
                                      const std::vector<at::Tensor>& gradients);

}  // namespace pytracker
