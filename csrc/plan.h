// From parameters to what a back end reads: takes the .grad of every parameter, notices what has changed since the last
// step, and never waits for a device. The only place where tensors are validated, for all back ends.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "dtensor.h"
#include "parameters.h"

namespace pytracker {

// What of a parameter is reduced: its gradient; its own values, which are missing where they cannot be read; or, as an
// operator is given them, values that must be there.
enum class Source { kGradient, kValue, kTensor };

// Elements of a flat tensor that belong to one parameter (FSDP's flat parameters); a negative length: all of them.
struct Window {
  int64_t offset = 0, length = -1;
};

// The tensors of one device, in the order in which the parameters were given.
struct Group {
  explicit Group(c10::Device device) : device(device) {}
  c10::Device device;
  std::vector<int64_t> members;   // indices of the parameters
  Layouts layouts;                // [members]
  std::vector<const void*> data;  // [members] null: no gradient
  std::vector<at::Tensor> kept;   // [members] what `data` points into where that is not the gradient itself
  at::Tensor scratch;             // a row that is read before the next one is written
  std::unique_ptr<Backend> backend;
};

class Plan {
 public:
  // Without windows every tensor is read whole; a parameter may occur several times, with different windows.
  Plan(Parameters parameters, std::vector<std::string> names, Source source, std::vector<Window> windows = {});

  // Reads the pointers of all gradients. A gradient that moved, appeared or vanished costs nothing; one whose dtype or
  // shape in memory changed renews its layout; one on another device renews the groups (`generation` grows).
  void gather();

  // The same plan for other tensors, as many and on the same devices: tables are kept where the layouts are the same.
  // Without tensors it lets go of those it has. False where the plan does not fit.
  bool rebind(std::vector<at::Tensor> tensors);

  // Lets go of the gradients that were gathered, at the end of what reads them: they may be freed from then on.
  void give_back() { borrowed_.clear(); }
  struct Borrowed {
    Plan& plan;
    ~Borrowed() { plan.give_back(); }
  };

  // Gathers, and reduces into one row for each device. grad_scale divides the statistics.
  std::vector<at::Tensor> reduce(const std::optional<at::Tensor>& grad_scale);

  // Gathers and reduces; returns the total norm and the largest norm of one parameter. Waits for the device.
  std::pair<double, double> norm_and_max();

  // Gathers, and works out the factor that brings the total norm down to max_norm: the norm, the norm in float32, and
  // the factor ([1]), on the device of the gradients, which must be one device. scale() or give_back() comes next.
  std::array<at::Tensor, 3> reduce_and_clip(double max_norm, Order order);

  // Multiplies the gathered gradients by a factor, or each by its own (float64 [1] or [parameters]), and tells
  // autograd.
  void scale(const at::Tensor& factors);

  // From now on gather() takes only the gradients of these parameters, and the others are missing; none: of all.
  void select(const std::vector<int64_t>& parameters);

  // From now on gather() takes these in the place of the parameters' own, one each, undefined where there is none; an
  // empty list: their own again.
  void give(std::vector<at::Tensor> gradients);

  Parameters& parameters() { return parameters_; }
  const Parameters& parameters() const { return parameters_; }
  const std::vector<std::string>& names() const { return names_; }
  std::vector<Group>& groups() { return groups_; }
  const std::vector<Group>& groups() const { return groups_; }
  int64_t generation() const { return generation_; }
  // Whether a parameter is a tensor subclass, such as a DTensor, or is read through a window.
  bool has_pieces() const { return has_pieces_; }
  // The gathered tensors themselves.
  std::vector<at::Tensor> sources() const;
  // Whether there is one of float64 or complex128 among the gradients as they were last found.
  bool any_is_double() const;

  // The elements of each gradient as it was last found, float64 [T] on the host: another tensor where one has changed.
  const at::Tensor& elements();

 private:
  struct Slot {  // what the fast path of gather() compares, side by side in memory
    int64_t numel;
    int32_t group, position;
    c10::ScalarType dtype;
    bool plain;            // the last gradient was a run of memory without gaps
    bool copied = false;   // what is read is a copy of the last gradient, which is to be scaled itself
    int32_t strided = -1;  // its place in Layouts::strided, once it has had one
    int64_t elements = 0;  // of the last gradient, those that are not stored included
  };

  struct Local {
    at::Tensor piece;
    bool copied = false;  // nothing else holds this memory
  };

  // A gradient as a tensor that is memory with strides.
  struct Found {
    at::Tensor tensor;       // undefined: there is none, or its memory was freed
    bool copied = false;     // not the gradient's own memory
    bool all_zeros = false;  // there is no memory, and every element is zero
    int64_t elements = 0;    // those that are not stored included
  };

  c10::Device home_of(size_t parameter) const;
  void group_by_device();
  bool is_left_out(int64_t parameter) const { return !left_out_.empty() && left_out_[parameter] != 0; }
  void reduce_into(Group& group, const at::Tensor& row, const Scalar& grad_scale);
  const at::Tensor& source_of(int64_t parameter) const;
  const void* plain_data(const Slot& slot, const c10::TensorImpl* impl) const;
  void take_pieces();
  void read_again(const std::vector<bool>& but);
  bool take_piece(int64_t parameter, const at::Tensor& tensor);
  std::string subject(int64_t parameter) const;
  at::Tensor in_window(const at::Tensor& flat, int64_t parameter) const;
  bool describe(int64_t parameter);
  Found find(int64_t parameter, const Local& local) const;
  void lay_out(int64_t parameter, Found found, const Local& local);

  Parameters parameters_;
  std::vector<std::string> names_;
  Source source_;
  std::vector<Window> windows_;
  std::vector<char> left_out_;         // [parameters] those whose gradients are not taken; empty: none
  std::vector<at::Tensor> given_;      // [parameters] what is taken for their gradients; empty: their own
  std::vector<Placement> placements_;  // of the gradients that are DTensors
  std::vector<Local> pieces_;          // what lies on this rank of those, from take_pieces() to describe()
  std::vector<Slot> slots_;
  std::vector<Group> groups_;
  std::vector<int64_t> irregular_;    // parameters that the fast path left over in this gather()
  std::vector<at::Tensor> borrowed_;  // what else `data` points into, until it is given back
  at::Tensor elements_;               // undefined: to be made from the slots
  int64_t generation_ = 0;
  bool has_pieces_ = false;
};

}  // namespace pytracker
