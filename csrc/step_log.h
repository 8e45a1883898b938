// The log of steps that lives on the device: a ring of rows, one a step, that the host has not read yet.
//
// A row is written by the back end's launch; the host adds to it what it knows without asking (which step it was, which
// scalars were given). pytracker/core/device_log.py copies rows to the host and frees them with release().
#pragma once

#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "clip.h"
#include "plan.h"

namespace pytracker {

// A value to be recorded with the step that is about to be written.
struct NamedValue {
  int32_t slot;
  double number;
  at::Tensor tensor;  // defined: `number` is not looked at
};

// The learning rate of one parameter group: a number where the host knows it, and so no scalar of the row; the slot of
// a scalar where it is a tensor on a device.
struct Rate {
  static constexpr int32_t kOnHost = -1, kNone = -2;
  double number = 0;
  int32_t slot = kNone;
  bool operator==(const Rate& other) const {  // by the bits: a NaN is no news for ever
    return slot == other.slot && std::memcmp(&number, &other.number, sizeof(number)) == 0;
  }
};

struct Rates {
  std::shared_ptr<const std::vector<std::string>> names;  // null: there is no optimizer
  std::vector<Rate> values;                               // [names]
  bool operator==(const Rates& other) const { return names == other.names && values == other.values; }
};

// What the host is given with a step.
struct StepInput {
  std::vector<NamedValue> values;
  std::optional<NamedValue> grad_scale;  // divides the statistics; its slot is not looked at
  Rates rates;
};

// What holds for many rows, and is kept once for all of them.
struct Context {
  at::Tensor elements;  // of each gradient: Plan::elements()
  Rates rates;
};

// What the host knows of a row.
struct RowNote {
  int64_t step;
  // For each device, bit `slot` is set where that scalar lies in the device's row; none for a row of a replay, of which
  // the capture that its mark names knows it.
  std::vector<uint64_t> given;
  std::shared_ptr<const Context> context;
};

class StepLog {
 public:
  // `capacity` rows and `slots` scalars a row (at most kMaxScalars), allocated once; `extras`: with the further
  // columns.
  StepLog(std::shared_ptr<Plan> plan, int64_t capacity, int64_t slots, bool extras);

  // The slot of a scalar's name, new names included; -1 where all slots are taken.
  int32_t slot_of(const std::string& name);

  // Reduces the gathered gradients into the next row, without waiting, and decides on a clip (null: none), which needs
  // a plan of one device. False while a graph is captured: no row is written, but one by each replay.
  bool append(int64_t step, const StepInput& input, const Clip* clip);

  // Gives a clip's results their slots in a row; false where there are none left.
  bool has_slots_for(const Clip& clip) {
    return (!clip.has_factor() || factor_slot() >= 0) && (!clip.may_skip() || skipped_slot() >= 0);
  }

  // Decides on a clip by the row that was appended last; norm: that of all ranks and devices, undefined: of the row.
  // False where the results cannot be recorded any more: the row is on its way to the host, or has no slots for them.
  bool decide(const Clip& clip, const at::Tensor& norm);

  // On each device a copy of the row that was appended last, or in a capture, of the row that a replay has appended.
  std::vector<at::Tensor> latest() const;

  // Whether a graph is being captured on a device of the log.
  bool capturing() const;

  // A graph with a captured append has been replayed: the device writes a row like that one. Which row it is the cursor
  // tells, which is noted in the order of the current stream.
  void replayed(int64_t step, const Rates& rates);

  // Makes the current stream of a group's device wait for all rows asked for up to now.
  void await_rows(int64_t group) { plan_->groups()[group].backend->await_rows(); }

  // Whether the device's tensors are where they were when the log was made.
  bool current() const { return generation_ == plan_->generation(); }

  int64_t written() const { return written_; }
  int64_t drained() const { return drained_; }
  int64_t capacity() const { return capacity_; }
  int64_t slots() const { return slots_; }
  const std::vector<std::string>& scalar_names() const { return scalar_names_; }
  const std::vector<at::Tensor>& rows() const { return rows_; }  // a device each: float64 [capacity, width + kMarks]
  // Of each captured append, in their order, the scalars in the rows of its replays, as in RowNote::given. Rows bear
  // mark kAskedBy: the number of their note, or -1 - the capture's index.
  const std::vector<uint64_t>& captures() const { return captures_; }
  // On the first device, int64: the rows written so far; and [capacity] the same as each announced replay left it.
  const at::Tensor& cursor() const { return cursors_[0]; }
  const at::Tensor& announced() const { return announced_; }
  Plan& plan() const { return *plan_; }

  // What the host knows of the rows from row `first` on, `count` at most. Rows are counted from the log's beginning.
  std::vector<RowNote> notes(int64_t first, int64_t count) const;
  // Makes the places of the rows before row `end` free: their copies to the host are under way.
  void release(int64_t end);

 private:
  int32_t factor_slot() { return slot_of("clip_factor"); }
  int32_t skipped_slot() { return slot_of("step_skipped"); }
  RowTarget target(size_t group, int64_t asked_by) const;
  Decision decision(const Clip& clip, const at::Tensor& norm, uint64_t& given, std::vector<at::Tensor>& kept);
  void note(int64_t step, std::vector<uint64_t> given, const Rates& rates);

  std::shared_ptr<Plan> plan_;
  int64_t capacity_, slots_, generation_;
  bool extras_;
  int64_t written_ = 0, drained_ = 0;
  std::vector<std::string> scalar_names_;
  std::unordered_map<std::string, int32_t> slot_by_name_;
  std::vector<at::Tensor> rows_;
  std::vector<at::Tensor> cursors_;                  // a device each: int64, the row that the next launch writes
  std::vector<std::shared_ptr<const void>> owners_;  // a device each: rows and cursor, which a captured graph shares
  std::vector<uint64_t> captures_;
  bool captured_ = false;  // the last append was
  at::Tensor announced_;
  std::deque<RowNote> notes_;
  std::shared_ptr<const Context> context_;    // of the last row
  std::vector<std::vector<Scalar>> scalars_;  // a device each, kept to be filled again
};

}  // namespace pytracker
