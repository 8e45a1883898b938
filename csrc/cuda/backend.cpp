// The CUDA back end: torch's streams and memory for the launchers of launch.h. A library of its own,
// `pytracker._C_cuda`: where it cannot be built or loaded, that costs the core nothing.
//
// Who waits for whom:
// * Eager steps of one plan follow each other, whatever streams they are on and however the layouts change: a step on
//   another stream waits, on the device, for the one before it.
// * What is captured in a graph runs later and as often as that is replayed, so it shares no table and no workspace
// with
//   eager steps, and it keeps what it uses until the graph is gone. The order of a replay is what the user makes it.
// * Who reads rows waits for the kernels that write them: the last eager one, and the last replay of each graph, which
//   records an event that is known outside of it.
#include "../backend.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "runtime.h"

namespace pytracker::cuda {
namespace {

void check_runtime(int error, const char* doing) {
  TORCH_CHECK(error == 0, "CUDA error while ", doing, ": ", cudaGetErrorString(error));
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels and streams of a device

std::mutex mutex;
std::map<c10::DeviceIndex, Kernels> kernels_by_device;  // never erased, so that a reference stays good

// The kernels of a device. The Python side looks for an image that fits and loads it; it may have done so already.
const Kernels& kernels_of(c10::Device device) {
  const auto known = [&]() -> const Kernels* {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = kernels_by_device.find(device.index());
    return found == kernels_by_device.end() ? nullptr : &found->second;
  };
  if (const Kernels* kernels = known()) return *kernels;
  std::string reason;
  {
    const py::gil_scoped_acquire gil;
    const py::object find = py::module_::import("pytracker.core.cuda").attr("reason_without_kernels");
    reason = find(static_cast<int>(device.index())).cast<std::string>();
  }
  const Kernels* kernels = known();
  TORCH_CHECK(kernels != nullptr, "pytracker has no kernels for ", device, ": ", reason);
  return *kernels;
}

c10::impl::VirtualGuardImpl implementation() { return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA); }

// A stream as torch knows it, for its memory, and as CUDA does.
struct CurrentStream {
  explicit CurrentStream(c10::Device device) : of_torch(implementation().getStream(device)) {
    void* raw = nullptr;
    const int32_t error = aoti_torch_get_current_cuda_stream(device.index(), &raw);
    TORCH_CHECK(error == 0, "torch does not say which stream is current on ", device);
    handle = static_cast<Stream>(raw);
  }
  bool operator==(const CurrentStream& other) const { return of_torch == other.of_torch; }
  // Whether somebody else made it, who may destroy it: torch knows such a stream by its handle.
  bool is_external() const { return handle != nullptr && of_torch.id() == reinterpret_cast<c10::StreamId>(handle); }

  c10::Stream of_torch;
  Stream handle = nullptr;
};

// The one stream of a device that uploads go to: none of torch's, on which the user may be capturing or waiting.
Stream upload_stream(c10::Device device) {
  static std::map<c10::DeviceIndex, Stream> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  Stream& stream = streams[device.index()];
  if (stream == nullptr) check_runtime(cudaStreamCreateWithFlags(&stream, kNonBlocking), "making a stream");
  return stream;
}

// An event that needs no stream to live once it is recorded.
class Event {
 public:
  Event() { check_runtime(cudaEventCreateWithFlags(&event_, kDisableTiming), "making an event"); }
  ~Event() { cudaEventDestroy(event_); }  // the driver keeps it until it is done
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Stream stream) { check_runtime(cudaEventRecord(event_, stream), "recording an event"); }
  // As a node of the graph under capture: each replay records it, for all to see.
  void record_in_replays(Stream stream) {
    check_runtime(cudaEventRecordWithFlags(event_, stream, kRecordExternal), "recording an event in a graph");
  }
  bool is_over() const {
    const OutsideOfCaptures outside;
    const bool over = cudaEventQuery(event_) == 0;
    if (!over) cudaGetLastError();  // which is no error that torch should find
    return over;
  }
  void block(Stream stream) { check_runtime(cudaStreamWaitEvent(stream, event_, 0), "waiting for an event"); }

 private:
  CUevent_st* event_ = nullptr;
};

std::unique_ptr<Event> recorded(Stream stream) {
  auto event = std::make_unique<Event>();
  event->record(stream);
  return event;
}

// ---------------------------------------------------------------------------------------------------------------------
// Captures

struct Capture {
  unsigned long long id = 0;  // 0: none is going on
  CUgraph_st* graph = nullptr;
};

Capture capture_on(Stream stream) {
  Capture capture;
  int status = 0;
  check_runtime(cudaStreamIsCapturing(stream, &status), "asking whether a stream is captured");
  if (status == 0) return capture;
  const void* const* dependencies = nullptr;
  const void* edges = nullptr;
  size_t count = 0;
  const int error =
      cudaStreamGetCaptureInfo_v2 != nullptr
          ? cudaStreamGetCaptureInfo_v2(stream, &status, &capture.id, &capture.graph, &dependencies, &count)
          : cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph, &dependencies, &edges, &count);
  check_runtime(error, "asking for the graph that is captured");
  return capture;
}

// What graphs have let go of. CUDA says so on a thread of its own, which may not call CUDA, so freeing is left to the
// next step.
class Released {
 public:
  using Owner = std::shared_ptr<const void>;

  static void add(void* owner) {
    const std::lock_guard<std::mutex> lock(guard());
    owners().emplace_back(static_cast<Owner*>(owner));
  }
  static void clear() {
    std::vector<std::unique_ptr<Owner>> gone;
    {
      const std::lock_guard<std::mutex> lock(guard());
      gone.swap(owners());
    }
  }

 private:
  static std::mutex& guard() {
    static auto* const mutex = new std::mutex();  // never destroyed: CUDA's thread may outlive this library
    return *mutex;
  }
  static std::vector<std::unique_ptr<Owner>>& owners() {
    static auto* const all = new std::vector<std::unique_ptr<Owner>>();
    return *all;
  }
};

// Keeps `owner` alive as long as the graph under capture, and what is instantiated of it.
void keep_as_long_as(CUgraph_st* graph, std::shared_ptr<const void> owner) {
  if (owner == nullptr) return;
  CUuserObject_st* object = nullptr;
  auto* const held = new Released::Owner(std::move(owner));
  check_runtime(cudaUserObjectCreate(&object, held, &Released::add, 1, kNoDestructorSync), "tying memory to a graph");
  check_runtime(cudaGraphRetainUserObject(graph, object, 1, kMove), "tying memory to a graph");
}

// ---------------------------------------------------------------------------------------------------------------------
// The back end

size_t aligned(size_t bytes) { return (bytes + kVectorBytes - 1) / kVectorBytes * kVectorBytes; }

// What the device keeps for one version of the layouts, or for one after the other.
struct Plan {
  Table table;  // whose bytes are on the device
  size_t table_bytes = 0;
  at::Tensor memory;  // the tickets, the table, and the workspace
  size_t tickets_room = 0;
  std::byte* tickets() const { return static_cast<std::byte*>(memory.data_ptr()); }
  std::byte* device_table() const { return tickets() + tickets_room; }
  std::byte* workspace() const { return device_table() + aligned(table_bytes); }

  bool has_room_for(const Table& other) const {
    const size_t needed = tickets_room + aligned(other.bytes.size()) + other.workspace_bytes;
    return other.tickets_bytes <= tickets_room && needed <= memory.storage().nbytes();
  }
  void take(Table other) {
    table_bytes = other.bytes.size();
    table = std::move(other);
    table.bytes = {};
  }
};

// Who used a plan last, and what comes after it.
struct Use {
  uint64_t version = 0;
  std::shared_ptr<Plan> plan;
  std::optional<CurrentStream> stream;
  std::unique_ptr<Event> finished;  // recorded where the stream may be destroyed behind our back
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(c10::Device device) : device_(device), kernels_(kernels_of(device)) {}

  void step(const StepRequest& request) override {
    use(*request.layouts, request.owner, [&](const Plan& plan, Stream stream, CUgraph_st* captured_in) {
      gradients(kernels_, request, plan.table, plan.device_table(), plan.workspace(), plan.tickets(), stream);
      if (captured_in != nullptr && request.row.cursor != nullptr) mark_replays(stream, captured_in);
    });
  }

  void decide(const Layouts& layouts, const Decision& decision, const RowTarget& row,
              const std::shared_ptr<const void>& owner) override {
    use(layouts, owner, [&](const Plan&, Stream stream, CUgraph_st* captured_in) {
      cuda::decide(kernels_, decision, row, static_cast<int64_t>(layouts.tensors.size()), stream);
      if (captured_in != nullptr) mark_replays(stream, captured_in);
    });
  }

  void await_rows() override {
    const c10::DeviceGuard guard(device_);
    ensure_context(device_.index());
    const Stream stream = CurrentStream(device_).handle;
    if (eager_.stream) {
      const std::unique_ptr<Event> now = eager_.finished ? nullptr : recorded(eager_.stream->handle);
      (now ? now : eager_.finished)->block(stream);
    }
    if (noted_) noted_->block(stream);
    await_replays(stream);
  }

  void note_cursor(const int64_t* cursor, int64_t* note) override {
    const c10::DeviceGuard guard(device_);
    ensure_context(device_.index());
    const Stream stream = CurrentStream(device_).handle;
    await_replays(stream);
    check_runtime(cudaMemcpyAsync(note, cursor, sizeof(*note), kWithinDevice, stream), "noting a replay");
    noted_ = recorded(stream);
  }

  bool capturing() const override {
    const c10::DeviceGuard guard(device_);
    ensure_context(device_.index());
    return capture_on(CurrentStream(device_).handle).id != 0;
  }

  void scale(const Layouts& layouts, void* const* gradients, const double* factors, int64_t stride) override {
    use(layouts, nullptr, [&](const Plan& plan, Stream stream, CUgraph_st*) {
      cuda::scale(kernels_, plan.table, plan.device_table(), gradients, factors, stride, stream);
    });
  }

  void update_meters(double* state, const Scalar* values, const Scalar* weights, int64_t count) override {
    const c10::DeviceGuard guard(device_);
    ensure_context(device_.index());
    cuda::update_meters(kernels_, state, values, weights, count, CurrentStream(device_).handle);
  }

 private:
  // From here on await_rows() waits for what a replay has written up to here.
  void mark_replays(Stream stream, CUgraph_st* captured_in) {
    replays_.push_back(std::make_shared<Event>());
    replays_.back()->record_in_replays(stream);
    keep_as_long_as(captured_in, replays_.back());
  }

  void await_replays(Stream stream) {
    const auto over = [](const std::shared_ptr<Event>& event) { return event.use_count() == 1 && event->is_over(); };
    replays_.erase(std::remove_if(replays_.begin(), replays_.end(), over), replays_.end());
    for (const std::shared_ptr<Event>& event : replays_) event->block(stream);
  }

  // Calls launch(plan, stream, graph under capture or null) in its place in the order of things. A capture keeps
  // `owner`.
  template <typename F>
  void use(const Layouts& layouts, const std::shared_ptr<const void>& owner, F launch) {
    const c10::DeviceGuard guard(device_);
    ensure_context(device_.index());
    Released::clear();
    const CurrentStream stream(device_);
    const Capture capture = capture_on(stream.handle);
    if (capture.id != 0 && capture.id != capture_) {
      captured_ = Use();
      capture_ = capture.id;
    }
    Use& last = capture.id != 0 ? captured_ : eager_;
    const bool moved = !last.stream || !(*last.stream == stream);
    if (last.stream && moved) {
      if (last.finished == nullptr) last.finished = recorded(last.stream->handle);
      last.finished->block(stream.handle);
    }
    bool renewed = false;
    if (last.plan == nullptr || last.version != layouts.version) {
      Table table = build_table(layouts, kernels_.max_pointers());
      renewed = capture.id != 0 || last.plan == nullptr || !last.plan->has_room_for(table);
      if (renewed)
        last.plan = upload(std::move(table), last.plan == nullptr ? 1 : 2);
      else
        rewrite(*last.plan, std::move(table));
      last.version = layouts.version;
      if (capture.id != 0) keep_as_long_as(capture.graph, last.plan);
    }
    if (capture.id != 0) keep_as_long_as(capture.graph, owner);
    if (renewed || moved)
      implementation().recordDataPtrOnStream(last.plan->memory.storage().data_ptr(), stream.of_torch);
    last.stream = stream;
    last.finished.reset();
    launch(*last.plan, stream.handle, capture.graph);
    if (stream.is_external()) last.finished = recorded(stream.handle);
  }

  // Copies a table to where the one before is, in the order of the current stream, which has been made to follow the
  // step that used it: no wait and no allocation, since torch keeps the pinned memory for the next time.
  static void rewrite(Plan& plan, Table table) {
    const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(true);
    const auto size = static_cast<int64_t>(table.bytes.size());
    const at::Tensor staged = at::empty({size}, options);
    std::memcpy(staged.mutable_data_ptr(), table.bytes.data(), table.bytes.size());
    plan.memory.narrow(0, static_cast<int64_t>(plan.tickets_room), size).copy_(staged, /*non_blocking=*/true);
    plan.take(std::move(table));
  }

  // Copies a table to memory of its own, and waits for that: the first, and where one has become too large. It has a
  // stream of its own, so that the wait is for these few kilobytes and not for the training, and a capture may be going
  // on. `room`: times what it needs, where layouts change.
  std::shared_ptr<Plan> upload(Table table, size_t room) const {
    const OutsideOfCaptures outside;
    const auto id = reinterpret_cast<c10::StreamId>(upload_stream(device_));  // as torch knows what it did not make
    const c10::StreamGuard guard(c10::Stream(c10::Stream::UNSAFE, device_, id));
    auto plan = std::make_shared<Plan>();
    plan->tickets_room = aligned(room * table.tickets_bytes);
    std::vector<std::byte> bytes(plan->tickets_room);  // of zeros
    bytes.insert(bytes.end(), table.bytes.begin(), table.bytes.end());
    const auto options = at::TensorOptions().dtype(at::kByte);
    const auto filled = static_cast<int64_t>(bytes.size());
    const size_t rest = aligned(table.bytes.size()) + table.workspace_bytes;
    plan->memory = at::empty({static_cast<int64_t>(plan->tickets_room + room * rest)}, options.device(device_));
    plan->memory.narrow(0, 0, filled).copy_(at::from_blob(bytes.data(), {filled}, options.device(at::kCPU)));  // waits
    plan->take(std::move(table));
    return plan;
  }

  c10::Device device_;
  const Kernels& kernels_;
  Use eager_;
  Use captured_;                                 // of the latest capture
  unsigned long long capture_ = 0;               // its id
  std::vector<std::shared_ptr<Event>> replays_;  // of each captured step: where its latest replay is over
  std::unique_ptr<Event> noted_;                 // behind the latest note of the cursor
};

std::unique_ptr<Backend> make(c10::Device device) { return std::make_unique<CudaBackend>(device); }

// Loads kernels into a device, unless it has some.
void load(int device, const std::vector<std::string>& images) {
  const auto index = static_cast<c10::DeviceIndex>(device);
  const c10::Device where(c10::DeviceType::CUDA, index);
  const c10::DeviceGuard guard(where);
  const OutsideOfCaptures outside;
  const Kernels kernels = load_kernels(device, images);
  try {
    probe(kernels, upload_stream(where));
  } catch (...) {
    cudaGetLastError();  // or torch would find the error and think that it was its own
    throw;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  kernels_by_device.emplace(index, kernels);
}

int driver_version() {
  int version = 0;
  check(driver().cuDriverGetVersion(&version), "asking for the driver's version");
  return version;
}

}  // namespace
}  // namespace pytracker::cuda

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace pytracker;
  m.doc() = "The CUDA back end of pytracker; pytracker/core/cuda.py loads it and finds the kernels.";
  m.def("factory", [] { return py::capsule(reinterpret_cast<void*>(&cuda::make), "pytracker.BackendFactory"); });
  m.def("driver_version", &cuda::driver_version, "The newest CUDA that the driver knows, as 13000 for 13.0.");
  m.def("load_kernels", &cuda::load, py::arg("device"), py::arg("images"));
}
