// A back end: reduces the gradients of one device into a row. One instance for each plan and device, so that what it
// keeps (tables, workspace) is allocated once. The CPU's lies in cpu/, CUDA's in cuda/; each registers itself.
#pragma once

#include <c10/core/Device.h>

#include <memory>

#include "request.h"

namespace pytracker {

class Backend {
 public:
  virtual ~Backend() = default;

  // Reduces all gradients, records the scalars, writes the row. On a device with streams: enqueues, never waits.
  virtual void step(const StepRequest& request) = 0;

  // Whether what step() enqueues now is captured in a graph, to run later and as often as that is replayed.
  virtual bool capturing() const { return false; }

  // Makes the current stream wait for all rows that were asked for up to now: those of eager steps, and those of the
  // replays that have been launched; and for the notes of the cursor.
  virtual void await_rows() {}

  // Notes in *note how far the replays that have been launched bring *cursor. Enqueued on the current stream.
  virtual void note_cursor(const int64_t* /*cursor*/, int64_t* /*note*/) {}

  // Decides by the latest row, of gradients with these layouts, once it is written; `owner` as in a request.
  virtual void decide(const Layouts& layouts, const Decision& decision, const RowTarget& row,
                      const std::shared_ptr<const void>& owner) = 0;

  // Multiplies gradient t by factors[t * stride] (float64, in the back end's memory), so with a stride of 0 all by the
  // same; touches nothing where a factor is 1.
  virtual void scale(const Layouts& layouts, void* const* gradients, const double* factors, int64_t stride) = 0;

  // Feeds `count` values, each with its weight, to the meters that the values name by slot. state: [meters,
  // kMeterColumns] in the back end's memory.
  virtual void update_meters(double* state, const Scalar* values, const Scalar* weights, int64_t count) = 0;
};

using BackendFactory = std::unique_ptr<Backend> (*)(c10::Device);

// Called once for each back end when the library is loaded.
bool register_backend(c10::DeviceType type, BackendFactory factory);

bool has_backend(c10::DeviceType type);

// Throws where the device has no back end; callers ask has_backend first to name the parameter in their error.
std::unique_ptr<Backend> make_backend(c10::Device device);

}  // namespace pytracker
