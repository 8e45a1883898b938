// The parameters of a plan, by their Python objects.
//
// Not by the tensors in these: torch.utils.swap_tensors, which Module.to uses for DTensors, puts another tensor into a
// parameter's object, and refuses where anything but the object refers to the old one, if only weakly. And not for
// longer than needed: a plan that is kept for the next call must keep no model alive.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

struct _object;

namespace pytracker {

class Parameters {
 public:
  // What an operator was given: tensors without objects, which belong to one call.
  explicit Parameters(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)), holds_(1) {}
  // Takes a reference to each object.
  static Parameters of_objects(std::vector<struct _object*> objects);

  Parameters(Parameters&& other) noexcept;
  Parameters(const Parameters&) = delete;
  ~Parameters();

  size_t size() const { return objects_.empty() ? tensors_.size() : objects_.size(); }
  const at::Tensor& operator[](size_t i) const;
  const std::vector<struct _object*>& objects() const { return objects_; }

  // The next call's tensors, or none between two.
  void rebind(std::vector<at::Tensor> tensors) { tensors_ = std::move(tensors); }

  // Holds the objects until as many calls of release(); without a hold they may be gone, and must not be touched.
  // The first hold() is for a caller who knows that they live.
  void hold();
  void release();
  bool held() const { return holds_ > 0; }

 private:
  std::vector<struct _object*> objects_;
  std::vector<at::Tensor> tensors_;
  int holds_ = 0;
};

}  // namespace pytracker
