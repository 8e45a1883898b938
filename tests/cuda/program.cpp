// Drives the kernels without torch, so that a run takes a second and many seeds of the simulator can be tried.
//
//     program SCENARIO [SEEDS]
//
// Every seed must give the row that the oracle expects, and all must give the same bits. Prints "OK" and a hash of the
// rows, which the caller compares between numbers of SMs and schedules.
#include <map>

#include "problem.h"

namespace pytracker {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16,  Dtype::kFloat16,
                             Dtype::kFloat64, Dtype::kComplex64, Dtype::kComplex128};

// Every dtype and kind of values, aligned or not, in sizes around those where the kernel changes its way.
void every_kind() {
  for (const Dtype dtype : kDtypes) {
    Problem problem;
    for (const int64_t numel : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 100, 767, 768, 1536, 3071, 3073, 6500}) {
      const int64_t lead = numel % 5;
      problem.gradients.push_back(make_gradient(dtype, numel, Values::kNormal, lead));
    }
    for (int v = 0; v <= static_cast<int>(Values::kWide); ++v)
      for (const int64_t numel : {1, 9, 640, 4000})
        problem.gradients.push_back(make_gradient(dtype, numel, static_cast<Values>(v), v % 3));
    check(std::move(problem));
  }
}

// Tensors that lie in several blocks, with whole ones, missing ones and empty ones between them.
void spanning() {
  Problem problem;
  uint64_t n = 0;
  for (const Dtype dtype : kDtypes)
    for (const int64_t numel : {20000, 64, 9000, 0, 1, 5000}) {
      problem.gradients.push_back(
          make_gradient(dtype, numel, static_cast<Values>(n % 9), static_cast<int64_t>(n % 3), n));
      problem.gradients.back().missing = ++n % 5 == 0;
    }
  check(std::move(problem));
}

// The further columns in a log's rows: every dtype and kind of values, in one block and in several, with gaps, repeated
// and missing; of a scaled gradient, too. What else the rows have is what it is without them.
std::vector<double> extras_of_some_steps() {
  Problem problem;
  problem.strided = {{2, {40, 30}, {64, 2}}};
  int64_t n = 0;
  for (const Dtype dtype : kDtypes) {
    for (int v = 0; v <= static_cast<int>(Values::kWide); ++v)
      problem.gradients.push_back(make_gradient(dtype, v == 0 ? 3 : 150, static_cast<Values>(v), n++ % 3));
    problem.gradients.push_back(make_gradient(dtype, 32000 / item_size(dtype), Values::kWide, n % 2));
  }
  problem.gradients.push_back(make_strided(Dtype::kFloat32, problem.strided[0], 0));
  problem.gradients.back().layout.repeat = 3;
  problem.gradients.push_back(make_gradient(Dtype::kBFloat16, 0, Values::kNormal));
  problem.gradients[1].missing = problem.gradients[9].missing = true;
  problem.prepare();
  const int64_t tensors = static_cast<int64_t>(problem.gradients.size());
  const int64_t width = problem.width(1) + tensors * kExtraColumns, stride = width + kMarks;
  const Buffer rows(2 * stride * sizeof(double)), cursor(sizeof(int64_t));
  CHECK(cudaMemset(rows.as(), 0, 2 * stride * sizeof(double)));
  CHECK(cudaMemset(cursor.as(), 0, sizeof(int64_t)));
  const Scalar scalar = {nullptr, 0.5};
  StepRequest request;
  request.row = {rows.as<double>(), stride, 2, cursor.as<int64_t>()};
  request.scalars = &scalar;
  request.n_scalars = 1;
  request.extras = true;
  problem.step(request);
  request.grad_scale.value = 4;
  problem.step(request);
  const std::vector<double> got = download(rows, 2 * stride);
  for (const int step : {0, 1}) {
    const double* row = got.data() + step * stride;
    problem.check_row(row, step == 0 ? 1 : 4);
    problem.check_extras(row, stride, step == 0 ? 1 : 4);
    expect(row[problem.width()] == 0.5 && row[stride - kMarks + kNumber] == step, "a scalar or a mark");
  }
  const Buffer plain(problem.width() * sizeof(double));
  StepRequest without;
  without.row.rows = plain.as<double>();
  problem.step(without);
  const std::vector<double> same = download(plain, problem.width());
  expect(std::memcmp(same.data(), got.data(), same.size() * sizeof(double)) == 0, "other moments with more columns");
  return got;
}

void extras() { under_all_seeds(extras_of_some_steps); }

// What the runs under weak memory and the race check go through: small, with everything that crosses blocks.
void tickets() {
  Problem problem;
  for (const int64_t numel : {9000, 10, 4000, 7000, 20, 12000})
    problem.gradients.push_back(make_gradient(Dtype::kFloat32, numel, Values::kNormal));
  problem.gradients[3].missing = true;
  for (int t = 0; t < 30; ++t) problem.gradients.push_back(make_gradient(Dtype::kBFloat16, 10 * t, Values::kNormal));
  check(std::move(problem));
}

// Gradients that come and go from step to step, of which some lie in several blocks.
void comes_and_goes() {
  Problem problem;
  for (const int64_t numel : {9000, 10, 4000, 7000, 20, 12000})
    problem.gradients.push_back(make_gradient(Dtype::kFloat32, numel, Values::kNormal));
  problem.prepare();
  under_all_seeds([&] {
    std::vector<double> got;
    for (const size_t missing : {6, 0, 2, 6, 3, 5, 6, 1}) {
      for (size_t t = 0; t < problem.gradients.size(); ++t) problem.gradients[t].missing = t == missing;
      const Buffer row(problem.width() * sizeof(double));
      StepRequest request;
      request.row.rows = row.as<double>();
      problem.step(request);
      got = download(row, problem.width());
      problem.check_row(got.data());
    }
    return got;
  });
}

// Shares so large that several tensors, each long enough for a whole block, lie in one.
void long_ones() {
  Problem problem;
  problem.gradients.push_back(make_gradient(Dtype::kFloat64, 1300000, Values::kSparse));
  for (int t = 0; t < 12; ++t) problem.gradients.push_back(make_gradient(Dtype::kFloat32, 1800, Values::kNormal));
  problem.prepare();
  expect(problem.table.share >= 2 * (1800 / 4 + cuda::kTensorCost), "two of the tensors fit into a share");
  check(std::move(problem));
}

// More tensors than one launch takes pointers for.
void many() {
  Problem problem;
  for (int t = 0; t < 9000; ++t) {
    const int64_t numel = t == 3900 ? 30000 : t % 70;
    problem.gradients.push_back(make_gradient(kDtypes[t % 4], numel, Values::kNormal, t % 2, t));
    problem.gradients.back().missing = t % 11 == 10;
  }
  problem.prepare();
  expect(problem.table.launches.size() == 3, "9,000 tensors take three launches");
  check(std::move(problem));
}

// A driver that takes no more than 4 KB of parameters gets more launches, and the same bits. 1,000 are some, 1,100
// many.
void same_bits_in_few(int count) {
  std::vector<std::vector<double>> rows;
  for (const bool few : {false, true}) {
    Problem problem;
    problem.few_pointers = few;
    for (int t = 0; t < count; ++t)
      problem.gradients.push_back(make_gradient(kDtypes[t % 4], t == 500 ? 30000 : t % 70, Values::kNormal, t % 2, t));
    problem.prepare();
    expect(problem.table.launches.size() == (few ? 4 : 1), "1,000 tensors take four launches of few pointers");
    const Buffer row(problem.width() * sizeof(double));
    StepRequest request;
    request.row.rows = row.as<double>();
    problem.step(request);
    rows.push_back(download(row, problem.width()));
    problem.check_row(rows.back().data());
  }
  expect(rows[0] == rows[1], "other bits with few pointers");
}
void few_pointers() {
  for (const int count : {1000, 1100}) same_bits_in_few(count);
}

// No tensors, only missing ones, only empty ones.
void nothing() {
  check({});
  Problem missing, empty;
  for (const int64_t numel : {10, 20000}) {
    missing.gradients.push_back(make_gradient(Dtype::kFloat32, numel, Values::kNormal));
    missing.gradients.back().missing = true;
  }
  check(std::move(missing));
  for (int t = 0; t < 40; ++t) empty.gradients.push_back(make_gradient(Dtype::kBFloat16, 0, Values::kNormal));
  check(std::move(empty));
}

// One large tensor; the worst values for chains of fp32 among them.
void large() {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat64})
    for (const Values values : {Values::kNormal, Values::kWorst}) {
      Problem problem;
      problem.gradients.push_back(make_gradient(dtype, 300001, values, values == Values::kWorst ? 0 : 1));
      check(std::move(problem));
    }
}

// More elements than 32 bits count: zeros, and a few threes at the end. Takes 4 GB of the device.
void huge() {
  constexpr int64_t kNumel = (int64_t{1} << 31) + 12345, kLast = 1000;
  Gradient g;
  g.layout.dtype = Dtype::kBFloat16;
  g.layout.numel = kNumel;
  g.device = Buffer(kNumel * sizeof(BFloat16));
  CHECK(cudaMemset(g.device.as(), 0, kNumel * sizeof(BFloat16)));
  const std::vector<BFloat16> threes(kLast, BFloat16(3));
  CHECK(cudaMemcpy(g.device.as<BFloat16>() + kNumel - kLast, threes.data(), kLast * sizeof(BFloat16),
                   cudaMemcpyHostToDevice));
  for (int64_t i = 0; i < kLast; ++i) g.expected.add(3, 0, false);
  g.expected.zeros = kNumel - kLast;
  Problem problem;
  problem.gradients.push_back(std::move(g));
  check(std::move(problem));
}

void with_gaps() {
  for (const Dtype dtype : kDtypes) {
    Problem problem;
    problem.strided = {{2, {40, 30}, {64, 2}}, {3, {7, 5, 11}, {200, 30, 2}}, {1, {3000}, {3}}};
    for (int32_t s = 0; s < 3; ++s) problem.gradients.push_back(make_strided(dtype, problem.strided[s], s));
    problem.gradients.push_back(make_gradient(dtype, 100, Values::kSparse));
    problem.gradients.back().layout.repeat = 3000000000;
    problem.gradients.back().layout.implicit_zeros = 5000000000;
    check(std::move(problem));
  }
}

// A log of rows on the device: the cursor, scalars of every kind, a loss scale and the clip factor.
std::vector<double> log_some_steps() {
  Problem problem;
  for (const int64_t numel : {5000, 100, 20000})
    problem.gradients.push_back(make_gradient(Dtype::kFloat16, numel, Values::kNormal));
  problem.prepare();
  constexpr int64_t kCapacity = 4, kScalars = 6;
  const int64_t width = problem.width(kScalars), stride = width + 3 + kMarks;
  Buffer rows(kCapacity * stride * sizeof(double)), clip(2 * sizeof(double));
  CHECK(cudaMemset(rows.as(), 0xff, kCapacity * stride * sizeof(double)));
  const int64_t start = (int64_t{1} << 40) + 2;
  const Buffer cursor(&start, sizeof(start));
  const float scale = 1024, loss32 = 2.5f;
  const double loss64 = -1e300;
  const Half loss16 = static_cast<Half>(0.5f);
  const BFloat16 loss_b16 = BFloat16(3.0f);
  const int64_t correct = (int64_t{1} << 40) + 1;
  const Buffer on_device[] = {{&scale, 4}, {&loss32, 4}, {&loss64, 8}, {&loss16, 2}, {&loss_b16, 2}, {&correct, 8}};
  const Scalar scalars[kScalars] = {
      {on_device[1].as(), 0, 5, Dtype::kFloat32, false}, {on_device[2].as(), 0, 4, Dtype::kFloat64, false},
      {on_device[3].as(), 0, 3, Dtype::kFloat16, false}, {on_device[4].as(), 0, 2, Dtype::kBFloat16, false},
      {on_device[5].as(), 0, 1, Dtype::kFloat32, true},  {nullptr, 0.125, 0, Dtype::kFloat64, false}};
  const double want[kScalars] = {0.125, static_cast<double>(correct), 3.0, 0.5, -1e300, 2.5};

  StepRequest request;
  request.row = {rows.as<double>(), stride, kCapacity, cursor.as<int64_t>(), -5};
  request.scalars = scalars;
  request.n_scalars = kScalars;
  request.grad_scale = {on_device[0].as(), 0, 0, Dtype::kFloat32, false};
  request.decision.order = Order::kL2;
  request.decision.max_norm.value = 0.01;
  request.decision.outcome = clip.as<double>();
  for (int step = 0; step < 6; ++step) problem.step(request);
  const std::vector<double> got = download(rows, kCapacity * stride);
  for (int64_t r = 0; r < kCapacity; ++r) {
    const double* row = got.data() + r * stride;
    problem.check_row(row, scale);
    for (int64_t s = 0; s < kScalars; ++s) expect(row[problem.width() + s] == want[s], "a scalar");
    for (int64_t c = width; c < stride - kMarks; ++c) expect(std::isnan(row[c]), "the gap between rows was written");
    const int64_t number = start + r + 2;  // of the last step that wrote to this place
    expect(row[stride - kMarks + kNumber] == static_cast<double>(number), "the row's number");
    expect(row[stride - kMarks + kAskedBy] == -5, "who asked for the row");
  }
  int64_t end = 0;
  CHECK(cudaMemcpy(&end, cursor.as(), sizeof(end), cudaMemcpyDeviceToHost));
  expect(end == start + 6, "the cursor");
  const std::vector<double> clipped = download(clip, 2);
  const double norm = std::sqrt(got[kSumSq]);
  expect(clipped[0] == norm && clipped[1] == 0.01 / (norm + 1e-6), "the clip factor");
  return {got.begin(), got.begin() + width};
}

void log() { under_all_seeds(log_some_steps); }

// What is decided where no clip is due, where one is, and where the norm is not finite: within the launch of the step,
// by one after it, and by a norm that is given; for each order.
void clip() {
  for (const Values values : {Values::kNormal, Values::kZero, Values::kNan, Values::kInf})
    for (const Order order : {Order::kL2, Order::kInf})
      for (const double max_norm : {1e6, 0.25})
        for (const int when : {0, 1, 2}) {
          Problem problem;
          problem.gradients.push_back(make_gradient(Dtype::kFloat32, 1000, values));
          problem.prepare();
          constexpr int64_t kCapacity = 3, kScalars = 2;
          const int64_t stride = problem.width(kScalars) + kMarks, start = 7;
          const Buffer rows(kCapacity * stride * sizeof(double)), outcome(2 * sizeof(double)), scale(4), flag(4);
          const Buffer cursor(&start, sizeof(start)), limit(&max_norm, sizeof(max_norm));
          const double other = 40;
          const Buffer given(&other, sizeof(other));
          Decision decision;
          decision.order = order;
          decision.max_norm.data = limit.as();
          decision.outcome = outcome.as<double>();
          decision.grad_scale = scale.as<float>();
          decision.found_inf = flag.as<float>();
          decision.factor_slot = 1;
          decision.skipped_slot = 0;
          StepRequest request;
          request.row = {rows.as<double>(), stride, kCapacity, cursor.as<int64_t>()};
          if (when == 0) request.decision = decision;
          problem.step(request);
          if (when == 2) decision.norm = given.as<double>();
          if (when > 0) cuda::decide(kernels(), decision, request.row, 1, nullptr);

          const std::vector<double> all = download(rows, kCapacity * stride);
          const double* row = all.data() + start % kCapacity * stride;
          const double norm = when == 2 ? other : order == Order::kInf ? row[kAbsMax] : std::sqrt(row[kSumSq]);
          const double ratio = max_norm / (norm + 1e-6), factor = ratio > 1 ? 1 : ratio;
          const bool skip = !std::isfinite(norm);
          const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
          const std::vector<double> got = download(outcome, 2);
          expect(same(got[0], norm) && same(got[1], factor), "the outcome of a decision");
          expect(same(row[tensor_offset(1) + 1], factor), "the recorded factor");
          expect(row[tensor_offset(1)] == (skip ? 1 : 0), "the recorded flag");
          float inverse = 0, found = 0;
          CHECK(cudaMemcpy(&inverse, scale.as(), 4, cudaMemcpyDeviceToHost));
          CHECK(cudaMemcpy(&found, flag.as(), 4, cudaMemcpyDeviceToHost));
          expect(found == (skip ? 1 : 0), "found_inf");
          expect(inverse == (skip ? 1 : static_cast<float>(1 / factor)), "grad_scale");
        }
}

void scale() {
  for (const auto& [factor, each] : {std::pair(0.3, false), std::pair(1.0, false), std::pair(0.3, true)}) {
    Problem problem;
    problem.strided = {{2, {40, 30}, {64, 2}}};
    for (const Dtype dtype : kDtypes) {
      problem.gradients.push_back(make_strided(dtype, problem.strided[0], 0));
      for (const int64_t numel : {0, 1, 9, 100, 12345})
        problem.gradients.push_back(make_gradient(dtype, numel, Values::kNormal, 1));
    }
    problem.gradients[4].missing = true;
    problem.prepare();
    std::vector<double> factors(each ? problem.gradients.size() : 1, factor);  // one for all, or one each, some of 1
    for (size_t t = 0; each && t < factors.size(); t += 3) factors[t] = 1;
    const Buffer device_factors(factors.data(), factors.size() * sizeof(double));
    std::vector<void*> data;
    for (const Gradient& g : problem.gradients)
      data.push_back(g.missing ? nullptr : const_cast<void*>(static_cast<const void*>(g.data())));
    cuda::scale(kernels(), problem.table, problem.device_table->as(), data.data(), device_factors.as<double>(),
                each ? 1 : 0, nullptr);
    for (size_t t = 0; t < problem.gradients.size(); ++t) {
      const Gradient& g = problem.gradients[t];
      const double own = factors[each ? t : 0];
      const Dtype dtype = g.layout.dtype;
      const bool wide = dtype == Dtype::kFloat64 || dtype == Dtype::kComplex128;
      const int64_t item = item_size(dtype) / (is_complex(dtype) ? 2 : 1);
      std::vector<std::byte> got(g.host.size()), want = g.host;
      CHECK(cudaMemcpy(got.data(), g.device.as(), got.size(), cudaMemcpyDeviceToHost));
      for (size_t i = 0; i < want.size(); i += item) {
        // Of a strided gradient, rows 40 x 30 begin every 64 elements, and every second element belongs to it.
        const int64_t element = static_cast<int64_t>(i) / item_size(dtype);
        const bool inside = g.layout.strided < 0 ? element >= g.lead : element % 64 < 60 && element % 2 == 0;
        if (!inside || g.missing || own == 1) continue;
        const double x = get(dtype, &want[i]);
        put(dtype, &want[i], wide ? x * own : static_cast<float>(x) * static_cast<float>(own));
      }
      expect(got == want, "a scaled gradient");
    }
  }
}

void meters() {
  constexpr int kMeters = 1500;
  const Buffer state(kMeters * kMeterColumns * sizeof(double));
  CHECK(cudaMemset(state.as(), 0, kMeters * kMeterColumns * sizeof(double)));
  std::vector<Scalar> values(kMeters);
  std::vector<Scalar> weights(kMeters);
  const float x = 0.25f;
  const int64_t two = 2;
  const Buffer on_device(&x, sizeof(x)), two_on_device(&two, sizeof(two));
  for (int i = 0; i < kMeters; ++i) {
    values[i] = i % 3 ? Scalar{nullptr, i * 0.5, i} : Scalar{on_device.as(), 0, i, Dtype::kFloat32};
    weights[i] = {nullptr, double(i % 7)};
    if (i % 7 == 2) weights[i] = {two_on_device.as(), 0, 0, Dtype::kFloat64, /*is_integer=*/true};
  }
  values[14] = {nullptr, INFINITY, 14};  // a weight of 0 adds nothing
  values[28] = {nullptr, NAN, 28};
  values[10] = {nullptr, NAN, 10};
  cuda::update_meters(kernels(), state.as<double>(), values.data(), weights.data(), kMeters, nullptr);
  values[11] = {nullptr, NAN, 11};
  cuda::update_meters(kernels(), state.as<double>(), values.data(), weights.data(), 50, nullptr);
  const std::vector<double> got = download(state, kMeters * kMeterColumns);
  for (int i = 0; i < kMeters; ++i) {
    const int times = i < 50 ? 2 : 1, nans = i == 10 ? 2 : i == 11 ? 1 : 0;
    const double value = i % 3 ? i * 0.5 : 0.25, count = (times - nans) * (i % 7);
    const double* meter = &got[i * kMeterColumns];
    const double given = values[i].data == nullptr ? values[i].value : value;
    const bool ok = (std::isnan(given) ? std::isnan(meter[kVal]) : meter[kVal] == given) &&
                    meter[kMeterSum] == count * value && meter[kCount] == count && meter[kMeterNans] == nans;
    expect(ok, "meter " + std::to_string(i));
  }
}

// A captured step replays on what the gradients then hold, and advances the cursor each time.
void graph() {
  Problem problem;
  for (const int64_t numel : {9000, 64, 30000})
    problem.gradients.push_back(make_gradient(Dtype::kFloat32, numel, Values::kNormal));
  problem.prepare();
  const int64_t width = problem.width() + kMarks;
  const Buffer rows(3 * width * sizeof(double)), cursor(sizeof(int64_t));
  CHECK(cudaMemset(cursor.as(), 0, sizeof(int64_t)));
  CHECK(cudaDeviceSynchronize());
  StepRequest request;
  request.row = {rows.as<double>(), width, 3, cursor.as<int64_t>()};
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  problem.step(request, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (int replay = 0; replay < 3; ++replay) {
    CHECK(cudaGraphLaunch(executable, stream));
    CHECK(cudaStreamSynchronize(stream));
    const std::vector<double> got = download(rows, 3 * width);
    problem.check_row(&got[replay * width]);
    for (Gradient& g : problem.gradients) {  // the same memory, other values
      Gradient other = make_gradient(g.layout.dtype, g.layout.numel, Values::kSparse, 0, 100 + replay);
      CHECK(cudaMemcpy(g.device.as(), other.host.data(), other.host.size(), cudaMemcpyHostToDevice));
      g.expected = other.expected;
    }
  }
}

const std::map<std::string, std::function<void()>> scenarios = {{"every_kind", every_kind},
                                                                {"spanning", spanning},
                                                                {"tickets", tickets},
                                                                {"comes_and_goes", comes_and_goes},
                                                                {"extras", extras},
                                                                {"long_ones", long_ones},
                                                                {"many", many},
                                                                {"few_pointers", few_pointers},
                                                                {"nothing", nothing},
                                                                {"large", large},
                                                                {"with_gaps", with_gaps},
                                                                {"log", log},
                                                                {"clip", clip},
                                                                {"scale", scale},
                                                                {"huge", huge},
                                                                {"meters", meters},
                                                                {"graph", graph}};

}  // namespace
}  // namespace pytracker

int main(int argc, char** argv) {
  using namespace pytracker;
  if (argc < 2 || scenarios.count(argv[1]) == 0) {
    for (const auto& [name, run] : scenarios) std::printf("%s\n", name.c_str());
    return argc < 2 ? 0 : 2;
  }
  if (argc > 2) seeds = std::atoi(argv[2]);
  scenarios.at(argv[1])();
  CHECK(cudaDeviceSynchronize());
  std::printf("OK %016llx\n", static_cast<unsigned long long>(hash));
}
