// A set of gradients on the device, what a back end keeps for them, and how a row of theirs is checked: against the
// oracle, and for the same bits under every schedule of the simulator.
#pragma once

#include <fstream>
#include <functional>
#include <iterator>
#include <memory>

#include "oracle.h"

namespace pytracker {

inline int seeds = 1;                          // of the simulator, that must all give the same bits
inline uint64_t hash = 14695981039346656037u;  // FNV-1a

// The kernels of the folder that the environment names, in the context of device 0; `few_only`: as with an old driver.
inline std::string image(const char* size) {
  std::ifstream file(std::string(std::getenv("KERNELS")) + "/" + size, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
inline const cuda::Kernels& kernels(bool few_only = false) {
  static const cuda::Kernels all = cuda::load_kernels(0, {image("few"), image("some"), image("many")});
  static const cuda::Kernels few = cuda::load_kernels(0, {image("few")});
  return few_only ? few : all;
}

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAIL %s\n", what.c_str());
  std::exit(1);
}

// The gradients of one device and what a back end keeps for them.
struct Problem {
  std::vector<Gradient> gradients;
  std::vector<Strided> strided;
  Layouts layouts;
  bool few_pointers = false;  // as with an old driver
  cuda::Table table;
  std::unique_ptr<Buffer> device_table, workspace, tickets;

  void prepare() {
    layouts.tensors.clear();
    for (const Gradient& g : gradients) layouts.tensors.push_back(g.layout);
    layouts.strided = strided;
    table = cuda::build_table(layouts, kernels(few_pointers).max_pointers());
    device_table = std::make_unique<Buffer>(table.bytes.data(), table.bytes.size());
    workspace = std::make_unique<Buffer>(table.workspace_bytes);
    tickets = std::make_unique<Buffer>(table.tickets_bytes);
    CHECK(cudaMemset(tickets->as(), 0, table.tickets_bytes));
  }
  std::vector<const void*> pointers() const {
    std::vector<const void*> data;
    for (const Gradient& g : gradients) data.push_back(g.data());
    return data;
  }
  int64_t width(int64_t scalars = 0) const { return row_width(static_cast<int64_t>(gradients.size()), scalars); }

  void step(StepRequest request, cudaStream_t stream = nullptr) const {
    const std::vector<const void*> data = pointers();  // a launcher copies what it needs
    request.layouts = &layouts;
    request.gradients = data.data();
    cuda::gradients(kernels(few_pointers), request, table, device_table->as(), workspace->as(), tickets->as(), stream);
  }

  // Compares a row with the oracle.
  void check_row(const double* row, double scale = 1) const {
    Expected total;
    double max_sum_sq = 0, tolerance = 1e-14;
    for (size_t t = 0; t < gradients.size(); ++t) {
      const double* columns = row + tensor_offset(static_cast<int64_t>(t));
      const std::string name = "tensor " + std::to_string(t) + " of " + std::to_string(gradients[t].layout.numel);
      if (gradients[t].missing) {
        for (int c = 0; c < kColumns; ++c) expect(std::isnan(columns[c]), name + " is not marked as missing");
        continue;
      }
      Expected want;
      want.merge(gradients[t].expected, static_cast<double>(gradients[t].layout.repeat));
      want.zeros += static_cast<double>(gradients[t].layout.implicit_zeros);
      want.sum /= scale;
      want.magnitude /= scale;
      want.sum_sq /= scale * scale;
      want.abs_max /= scale;
      expect(same(columns, want, tolerance_of(gradients[t].layout.dtype), name), "a tensor's row");
      total.merge(want);
      max_sum_sq = max_keep_nan(max_sum_sq, static_cast<double>(want.sum_sq));
      tolerance = std::max(tolerance, tolerance_of(gradients[t].layout.dtype));
    }
    expect(same(row, total, tolerance, "total"), "the totals");
    expect(near(row[kMaxSumSq], max_sum_sq, 2 * tolerance * max_sum_sq), "the largest norm");
  }

  // Compares the further columns of a row of a log.
  void check_extras(const double* row, int64_t stride, double scale = 1) const {
    const int64_t tensors = static_cast<int64_t>(gradients.size());
    for (int64_t t = 0; t < tensors; ++t) {
      const Gradient& g = gradients[t];
      const double* columns = row + extras_offset(stride, tensors, t);
      const std::string name = "tensor " + std::to_string(t) + " of " + std::to_string(g.layout.numel);
      if (g.missing) {
        for (int c = 0; c < kExtraColumns; ++c) expect(std::isnan(columns[c]), name + " is not marked as missing");
        continue;
      }
      Expected want;
      want.merge(g.expected, static_cast<double>(g.layout.repeat));
      want.l1 /= scale;
      expect(same_extras(columns, want, tolerance_of(g.layout.dtype), name), "a tensor's further columns");
    }
  }
};

inline std::vector<double> download(const Buffer& buffer, int64_t count) {
  std::vector<double> host(count);
  CHECK(cudaMemcpy(host.data(), buffer.as(), count * sizeof(double), cudaMemcpyDeviceToHost));
  return host;
}

inline void fold_into_hash(const std::vector<double>& values) {
  for (const double value : values) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    hash = (hash ^ (std::isnan(value) ? 1 : bits)) * 1099511628211u;  // a NaN is a NaN, whatever its payload
  }
}

// Calls f, which returns a row, under many schedules: the bits must be the same each time.
inline void under_all_seeds(const std::function<std::vector<double>()>& f) {
  std::vector<double> first;
  for (int seed = 0; seed < seeds; ++seed) {
    setenv("CUDASIM_SEED", std::to_string(seed).c_str(), 1);
    const std::vector<double> row = f();
    if (first.empty()) first = row;
    expect(std::memcmp(row.data(), first.data(), row.size() * sizeof(double)) == 0, "other bits than the first seed");
  }
  fold_into_hash(first);
}

// Reduces again and again, without preparing anew: what a step leaves behind must serve the next.
inline void check(Problem problem) {
  problem.prepare();
  under_all_seeds([&] {
    const Buffer row(problem.width() * sizeof(double));
    StepRequest request;
    request.row.rows = row.as<double>();
    problem.step(request);
    const std::vector<double> got = download(row, problem.width());
    problem.check_row(got.data());
    return got;
  });
}

}  // namespace pytracker
