// capacity: what a memory has room for beside the weights: longest_context, the tokens of a prompt of the cell's batch behind
// which eight steps still run, as `memory` does them; and largest_batch, the sequences of the cell's context. The memory is
// that of --memory, for a card that is not at hand, or else what there is.
//
// What has to fit is weights_bytes (what is held before the cell begins), the cache with residuals and scratch (kv_bytes_at_limit,
// by formula for any length, and held against its tensors in every run), and workspace_bytes, which is measured: the peak of
// small runs without those two, of the prompt and of the steps apart. Beyond two chunks of a prompt nothing in it grows but
// with the context, so two contexts give it for all, a + b context (where it grows, three on a line); and two batches, with as
// many tokens fed at once as the limit will have, for all batches (`workspace_*_bytes/ctx:N/batch:B/chunk:C`, in the JSON alone,
// are what the runs had). Half a percent of what weights leave is kept free, but by a batch that has been tried.
//
// On a GPU what counts is what libtorch's allocator has to take from the device. The cache's tensors are laid into its pieces one
// by one (GpuPieces). Of what else lives it takes more than tensors have, and less than where there is plenty: between the two,
// runs of the longer prompt under smaller and smaller limits find what is enough (allocator_bytes: so much more than tensors, or
// less, where they lie in what is free; workspace_bytes has that and what the cache's pieces are larger than its tensors; at a
// limit, where the cache leaves other pieces free, up to 22 MiB more were seen). Of few sequences one is more than that is worth:
// where the memory is at hand, largest_batch has been tried, and one more (batch_tried: 1). CUDA's own context, modules and graphs
// come on top (driver_bytes, where NVML says it): a card's memory_bytes is its total without those, and without --memory it is so
// by what the driver says. On a CPU it is the process's resident memory, libraries included; while it is measured, freed memory is
// not kept, and large tensors are resident whole.
//
// --check-capacity holds the predictions against runs at the limit, and 2 % beyond it: on a GPU the allocator is held to
// memory_bytes, so that the first must succeed and the second run out of memory; on a CPU the peak of resident memory is
// compared with it, which repeats itself to some 2 MB. Where a prediction is off, other lengths in steps of 4 % and the batches
// behind it find by how much (largest_context_seen, least_context_refused, least_batch_refused). That is a prompt as long as the limit, and another where memory runs out late or not at all: 260,000
// tokens of a 7B model take some 40 s on an H200, an hour on a CPU, where a small --memory does. Only a prompt's memory
// matters, so tokens are random.
//
// On request: it runs a prompt of four chunks and more for every cell. longest_context is by memory alone;
// longest_context_of_model, beside it, is what the model was made for.
#include "benchmarks/capacity.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "benchmarks/decoding.h"
#include "fixtures/machine/gpu_memory.h"
#include "fixtures/machine/host_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"

namespace kvq {
namespace {

constexpr double kMargin = 0.005;  // of what weights leave: kept free
constexpr double kBeyond = 1.02;   // of a limit: what must not fit
constexpr int64_t kTried = int64_t{1} << 19;   // tokens of a batch: some 20 s of a 7B model on an H200
constexpr double kPieces = 24.0 * (1 << 20);   // a segment and more, which temporaries may hold on to at a limit (22 MiB on an H200)
constexpr int64_t kMost = 1'000'000'000;

// On a CPU: as long as this lives, resident memory is what tensors have.
struct Exact {
  Exact() { ResidentAsAllocated(true); }
  ~Exact() { ResidentAsAllocated(false); }
};

// As long as this lives, libtorch's allocator takes no more of a GPU than this.
struct Cap {
  at::Device gpu;
  int64_t before;
  Cap(at::Device device, int64_t bytes) : gpu(device), before(GpuMemoryLimit(device)) { LimitGpuMemory(gpu, bytes); }
  ~Cap() { LimitGpuMemory(gpu, before); }
};

struct Prompt {
  int64_t context, batch, chunk;
  auto operator<=>(const Prompt&) const = default;
};

// Bytes at most, beyond what was held before and the cache: of tensors while the prompt was fed and in the steps, and what
// the allocator had taken for them.
struct Work {
  double prompt = 0, steps = 0, reserved = 0;
  double tensors() const { return std::max(prompt, steps); }
};

// Of two lengths, or numbers of sequences.
struct Trend {
  int64_t n0 = 1, n1 = 2;
  Work of0, of1;

  double Line(double Work::*part, int64_t n) const {
    const double slope = (of1.*part - of0.*part) / static_cast<double>(n1 - n0);
    return of0.*part + slope * static_cast<double>(n - n0);
  }
  // Of tensors, at most: the larger of prompt's and steps' line.
  double At(int64_t n) const { return std::max({0.0, Line(&Work::prompt, n), Line(&Work::steps, n)}); }
};

class Planner {
 public:
  Planner(Session& session, const Cell& cell)
      : session_(session),
        cell_(cell),
        model_(session.model(cell.model)),
        spec_(ParseSpec(cell.spec)),
        device_(model_.device()),
        gpu_(device_.is_cuda()) {}

  Counters Plan();

 private:
  // ---- what there is

  void Release() {
    session_.DropCapturedCache();
    session_.window_states("");
    ForgetMasks();
    GiveBackMemory(device_);
  }
  struct Peak {
    double tensors, reserved;
  };
  Peak ReadPeak() const {
    if (!gpu_) return {static_cast<double>(*PeakResidentBytes()), static_cast<double>(*PeakResidentBytes())};
    const GpuMemory now = ReadGpuMemory(device_);
    return {static_cast<double>(now.peak_allocated), static_cast<double>(now.peak_reserved)};
  }
  void ResetPeak() const { gpu_ ? ResetGpuPeaks(device_) : void(ResetPeakResident()); }

  // What tensors can have of the device, in the end; on a CPU the process.
  double Available() const {
    if (gpu_) {
      const double total = static_cast<double>(ReadGpuMemory(device_).device_total);
      return std::min(total - outside_, static_cast<double>(GpuMemoryLimit(device_)));
    }
    const int64_t mib = session_.options().memory_limit;
    const double free = static_cast<double>(AvailableBytes().value_or(0) + ResidentBytes().value_or(0));
    return mib > 0 ? std::min(free, static_cast<double>(mib << 20)) : free;
  }
  double Usable() const { return memory_ - kMargin * std::max(0.0, memory_ - held_); }

  // ---- formula and measurement

  std::vector<int64_t> Tensors(int64_t context, int64_t batch) const {
    return CacheTensors(spec_, model_.cache_shape(batch), context + kSteps, model_.kv_dtype(), model_.dtype());
  }
  double TensorBytes(int64_t context, int64_t batch) const {
    const std::vector<int64_t> bytes = Tensors(context, batch);
    return static_cast<double>(std::accumulate(bytes.begin(), bytes.end(), int64_t{0}));
  }
  // What is taken for the cache: on a GPU pieces of what is free between the weights, and segments.
  double CacheBytes(int64_t context, int64_t batch) const {
    return gpu_ ? static_cast<double>(Pieces(context, batch).taken()) : TensorBytes(context, batch);
  }
  GpuPieces Pieces(int64_t context, int64_t batch) const {
    GpuPieces pieces = pieces_;
    for (const int64_t bytes : Tensors(context, batch)) pieces.Take(bytes);
    return pieces;
  }

  // Once for each prompt.
  const Work& Measured(const Prompt& prompt) {
    const auto found = works_.find(prompt);
    if (found != works_.end()) return found->second;
    return works_[prompt] = Run(prompt);
  }
  Work Run(const Prompt& prompt);
  // Whether the prompt and its steps fit into so many bytes.
  bool Fits(const Prompt& prompt, double bytes);

  bool BatchFits(int64_t batch) { return Fits({cell_.context, batch, Chunk(batch)}, memory_); }

  // Nothing where memory runs out.
  const Work* TryMeasured(const Prompt& prompt) {
    try {
      return &Measured(prompt);
    } catch (const std::exception& error) {
      if (!IsOutOfMemory(error)) throw;
    }
    Release();
    return nullptr;
  }
  // Where work grows up to `limit`, a part of it that grows faster may be seen later: on to where three lie on a line, and
  // that is as steep as `least`, bytes for one more.
  template <typename PromptOf, typename Limit>
  void Extend(Trend& trend, double least, const PromptOf& prompt, const Limit& limit);

  void PlanContext();
  void PlanBatch();
  void FindSlack(const Prompt& prompt);
  void Check(Counters& counters);

  int64_t Chunk(int64_t batch) const { return session_.prefill_chunk(batch); }
  // Of a prompt, where positions are learned.
  int64_t MostContext() const {
    return model_.position_embedding().defined() ? model_.position_embedding().size(0) - kSteps : kMost;
  }
  double NeedOfContext(int64_t context) const { return held_ + CacheBytes(context, cell_.batch) + contexts_.At(context) + slack_; }
  double NeedOfBatch(int64_t batch) const { return held_ + CacheBytes(cell_.context, batch) + batches_.At(batch) + slack_; }

  Session& session_;
  const Cell& cell_;
  const Model& model_;
  const Spec spec_;
  const at::Device device_;
  const bool gpu_;
  std::map<Prompt, Work> works_;
  double memory_ = 0;   // that is planned for
  double held_ = 0;     // before a run
  GpuPieces pieces_;    // what is free in what the allocator has taken then
  double outside_ = 0;  // of the device, what libtorch's allocator has not, at most
  std::optional<double> driver_;  // of that this process's
  double slack_ = 0;    // what the allocator takes beyond a run's tensors, held to the least; below 0 where they lie in what is free
  Trend contexts_, batches_;
  double growth_ = 0;  // of work with a prompt's length, in small chunks, bytes a token
  int64_t longest_ = 0, largest_ = 0;
  bool tried_ = false;  // the largest batch, and one more
  double last_peak_ = 0;  // of a run, as the memory counts
};

Work Planner::Run(const Prompt& prompt) {
  Release();
  ResetPeak();
  const GpuMemory before = gpu_ ? ReadGpuMemory(device_) : GpuMemory();
  // Of a process the same for all runs: what a heap gives back between them comes again.
  const double held = gpu_ ? static_cast<double>(before.reserved) : held_ > 0 ? held_ : static_cast<double>(*ResidentBytes());
  const double tensors_before = gpu_ ? static_cast<double>(before.allocated) : held;
  if (gpu_) pieces_ = GpuPieces(device_);
  const double cache = TensorBytes(prompt.context, prompt.batch);
  Work work;
  Cell cell = cell_;
  cell.context = prompt.context, cell.batch = prompt.batch;
  {
    const auto options = at::TensorOptions(at::kLong).device(device_);
    const at::Tensor ids = at::randint(model_.config().vocab_size, {prompt.batch, prompt.context}, options);
    Decoding decoding(session_, cell, kSteps, ids, prompt.chunk);
    const at::Tensor token = decoding.Start(/*once=*/true);
    Synchronize(device_);
    const Peak in_prompt = ReadPeak();
    ResetPeak();
    decoding.Run(token);
    Synchronize(device_);
    const Peak in_steps = ReadPeak();
    const int64_t allocated = decoding.cache().AllocatedBytes() + decoding.cache().ScratchBytes();
    if (spec_.policy != Policy::kHf && static_cast<double>(allocated) != cache) {
      throw std::runtime_error(StrCat("capacity: the formula says ", cache, " bytes of cache, the tensors have ", allocated));
    }
    work.prompt = in_prompt.tensors - tensors_before - cache;
    work.steps = in_steps.tensors - tensors_before - cache;
    last_peak_ = std::max(in_prompt.reserved, in_steps.reserved);
    work.reserved = last_peak_ - held - CacheBytes(prompt.context, prompt.batch);
    if (gpu_) {
      const GpuMemory now = ReadGpuMemory(device_);
      outside_ = std::max(outside_, static_cast<double>(now.device_total - now.device_free - now.reserved));
      if (!session_.nvml().empty()) {
        const auto added = session_.nvml().front()->MemoryAddedBytes();
        if (added) driver_ = std::max(driver_.value_or(0), static_cast<double>(*added - now.reserved));
      }
    }
  }
  held_ = held;
  return work;
}

bool Planner::Fits(const Prompt& prompt, double bytes) {
  last_peak_ = 0;
  try {
    std::optional<Cap> cap;
    if (gpu_) cap.emplace(device_, static_cast<int64_t>(bytes));
    Run(prompt);
    return gpu_ || last_peak_ <= bytes;
  } catch (const std::exception& error) {
    if (!IsOutOfMemory(error)) throw;
  }
  Release();
  return false;
}

// Under limits between what tensors have and what the allocator took where it was free to.
void Planner::FindSlack(const Prompt& prompt) {
  const Work& work = works_.at(prompt);
  const GpuPieces pieces = Pieces(prompt.context, prompt.batch);
  const double least = held_ + static_cast<double>(pieces.taken()) + work.tensors();
  double fails = -static_cast<double>(pieces.Free()), fits = std::max(0.0, work.reserved - work.tensors());  // they may lie in what is free
  const double enough = std::max(4.0 * (1 << 20), 0.001 * (memory_ - held_));
  while (fits - fails > enough) {
    const double half = (fits + fails) / 2;
    (Fits(prompt, least + half) ? fits : fails) = half;
  }
  slack_ = fits;
}

template <typename PromptOf, typename Limit>
void Planner::Extend(Trend& trend, double least, const PromptOf& prompt, const Limit& limit) {
  for (;;) {
    const int64_t most = limit(), next = std::min(2 * trend.n1, most);
    const double matters = kMargin * (memory_ - held_), rest = static_cast<double>(most - trend.n1);
    if (4 * next < 5 * trend.n1 || std::max(least * rest, trend.At(most) - trend.of1.tensors()) < matters) return;
    const double line = trend.At(next);
    const Work* of = TryMeasured(prompt(next));
    if (of == nullptr) return;
    trend = {trend.n1, next, trend.of1, *of};
    const double slope = (trend.of1.tensors() - trend.of0.tensors()) / static_cast<double>(trend.n1 - trend.n0);
    const bool on_line = std::abs(of->tensors() - line) * static_cast<double>(most) / static_cast<double>(next) < matters;
    if (!gpu_) return;  // resident memory is not exact to what a third line would tell from the second
    if (on_line && (least - slope) * static_cast<double>(most - next) < matters) return;
  }
}

void Planner::PlanContext() {
  const int64_t chunk = Chunk(cell_.batch);
  const auto prompt = [&](int64_t context) { return Prompt{context, cell_.batch, chunk}; };
  const auto plan = [&] { return longest_ = LargestThatFits([&](int64_t n) { return NeedOfContext(n); }, Usable(), kMost); };
  int64_t shorter = 2 * chunk;
  while (shorter > 8 && 2 * shorter > MostContext()) shorter /= 2;
  if (!gpu_) Fits(prompt(shorter), 0);  // what a first run loads and never gives back
  for (;; shorter /= 2) {
    const bool last = shorter <= 8;
    const Work *of_shorter = TryMeasured(prompt(shorter)), *of_longer = TryMeasured(prompt(2 * shorter));
    if (of_shorter == nullptr || of_longer == nullptr) {
      if (last) throw OutOfMemory("a prompt of 16 tokens");
      continue;
    }
    contexts_ = {shorter, 2 * shorter, *of_shorter, *of_longer};
    memory_ = session_.options().memory > 0 ? static_cast<double>(session_.options().memory) : std::floor(Available());
    // Where fewer fit, a line through shorter ones says it better.
    if (plan() >= shorter || last || memory_ <= held_) break;
  }
  if (longest_ == 0) return;
  if (gpu_) FindSlack(prompt(2 * shorter));
  if (gpu_ && shorter == 2 * chunk && chunk >= 1024) {
    // What the tokens of one call take may hide what grows with those before them.
    const int64_t small = chunk / 32;
    const Work *few = TryMeasured({chunk / 2, cell_.batch, small}), *more = TryMeasured({chunk, cell_.batch, small});
    if (few != nullptr && more != nullptr) growth_ = (more->tensors() - few->tensors()) / static_cast<double>(chunk - chunk / 2);
  }
  Extend(contexts_, growth_, prompt, [&] { return std::min(plan(), MostContext()); });
  plan();
}

void Planner::PlanBatch() {
  const auto plan = [&] {
    const double usable = Usable() - (gpu_ ? kPieces : 0);
    return largest_ = LargestThatFits([&](int64_t batch) { return NeedOfBatch(batch); }, usable, kMost / cell_.context);
  };
  // What the batch will be decides how many tokens are fed at once, where chunks are by device; else chunks are what they are.
  batches_.of0 = batches_.of1 = contexts_.of0;
  const int64_t rough = std::max<int64_t>(plan(), 1);
  const auto prompt = [&](int64_t batch) {
    const bool by_device = gpu_ && session_.options().prefill_chunk == 0;
    return Prompt{cell_.context, batch, by_device ? std::max<int64_t>(Chunk(rough) * rough / batch, 1) : Chunk(batch)};
  };
  // As many tokens as a prompt of four chunks has: what memory is off by is then as small a share of them.
  int64_t fewer = std::max<int64_t>(1, 2 * Chunk(cell_.batch) * cell_.batch / cell_.context);
  for (;; fewer = std::max<int64_t>(1, fewer / 4)) {
    const Work *few = TryMeasured(prompt(fewer)), *more = TryMeasured(prompt(2 * fewer));
    if (fewer > 1 && (few == nullptr || more == nullptr)) continue;
    if (few == nullptr) throw OutOfMemory(StrCat("a prompt of ", cell_.context, " tokens"));
    batches_ = {fewer, 2 * fewer, *few, more != nullptr ? *more : Work{2 * few->prompt, 2 * few->steps, 2 * few->reserved}};
    break;
  }
  plan();
  Extend(batches_, growth_ * static_cast<double>(cell_.context) / static_cast<double>(cell_.batch), prompt, plan);
  plan();
  // Where few fit, one is more than what is in doubt: then it is tried.
  const auto few = [&](int64_t batch) { return batch * cell_.context <= kTried; };
  if (!gpu_ || memory_ <= held_ || !few(largest_ + 1) || (session_.options().memory > 0 && memory_ > Available())) return;
  tried_ = true;
  if (largest_ == 0 || BatchFits(largest_)) {
    while (few(largest_ + 1) && BatchFits(largest_ + 1)) ++largest_;
  } else {
    while (--largest_ > 0 && !BatchFits(largest_)) {}
  }
}

void Planner::Check(Counters& counters) {
  if (memory_ > Available() && session_.options().memory > 0) {
    session_.AddNote(StrCat("not checked: --memory is more than the ", static_cast<int64_t>(Available()) >> 20, " MiB that there are"));
    return;
  }
  const double bytes = memory_;
  const auto beyond = [](int64_t limit) { return std::max(limit + 1, static_cast<int64_t>(kBeyond * static_cast<double>(limit))); };
  const auto context = [&](int64_t n) { return Fits({n, cell_.batch, Chunk(cell_.batch)}, bytes); };
  if (longest_ > 0 && beyond(longest_) <= MostContext()) {
    const bool at_limit = context(longest_);
    if (last_peak_ > 0) counters.emplace_back("peak_at_limit_bytes", last_peak_);  // it ran to its end
    const bool above = context(beyond(longest_));
    counters.emplace_back("fits_at_limit", at_limit);
    counters.emplace_back("fails_beyond", !above);
    const auto share = [&](double of) { return std::max<int64_t>(std::llround(of * static_cast<double>(longest_)), 1); };
    int64_t fits = above ? beyond(longest_) : at_limit ? longest_ : 0, fails = above ? 0 : at_limit ? beyond(longest_) : longest_;
    for (double of = 0.98; fits == 0 && of > 0.85; of -= 0.04) (context(share(of)) ? fits : fails) = share(of);
    for (double of = 1.06; fails == 0 && of < 1.15 && share(of) <= MostContext(); of += 0.04) (context(share(of)) ? fits : fails) = share(of);
    counters.emplace_back("largest_context_seen", static_cast<double>(fits));
    if (fails > 0) counters.emplace_back("least_context_refused", static_cast<double>(fails));
  } else if (longest_ > 0) {
    session_.AddNote("context not checked: the model has learned fewer positions");
  }
  if (largest_ == 0) return;
  int64_t refused = beyond(largest_);
  counters.emplace_back("batch_fits_at_limit", BatchFits(largest_));
  counters.emplace_back("batch_fails_beyond", !BatchFits(refused));
  if (counters.back().second == 1) return;
  while (refused < 2 * largest_ && BatchFits(++refused)) {}
  counters.emplace_back("least_batch_refused", static_cast<double>(refused));
}

Counters Planner::Plan() {
  if (!gpu_ && (!ResidentBytes() || !ResetPeakResident())) throw Skip("this system does not report resident memory");
  std::optional<Exact> exact;
  if (!gpu_) exact.emplace();
  PlanContext();
  PlanBatch();
  if (memory_ <= held_) session_.AddNote("the weights alone take all of it");
  Counters counters = {{"longest_context", static_cast<double>(longest_)},
                       {"longest_context_of_model", static_cast<double>(model_.config().max_position_embeddings)},
                       {"largest_batch", static_cast<double>(largest_)},
                       {"batch_tried", tried_ ? 1.0 : 0.0},
                       {"memory_bytes", memory_},
                       {"weights_bytes", held_}};
  if (longest_ > 0) {
    const double need = NeedOfContext(longest_), cache = TensorBytes(longest_, cell_.batch);
    counters.emplace_back("bytes_at_limit", std::ceil(need));
    counters.emplace_back("kv_bytes_at_limit", cache);
    counters.emplace_back("workspace_bytes", std::ceil(need - held_ - cache));
  }
  if (driver_) counters.emplace_back("driver_bytes", *driver_);
  if (gpu_) counters.emplace_back("allocator_bytes", slack_);
  for (const auto& [prompt, work] : works_) {
    for (const auto& [name, bytes] : {std::pair("prompt", work.prompt), {"steps", work.steps}, {"reserved", work.reserved}}) {
      counters.emplace_back(StrCat("workspace_", name, "_bytes/ctx:", prompt.context, "/batch:", prompt.batch, "/chunk:", prompt.chunk), bytes);
    }
  }
  if (session_.options().check_capacity) Check(counters);
  return counters;
}

Counters Capacity(Session& session, const Cell& cell, benchmark::State& state) {
  if (session.devices().size() > 1) throw Skip("it plans for one device");
  Counters counters;
  for (auto _ : state) {
    state.SetIterationTime(Time(session.devices(), [&] { counters = Planner(session, cell).Plan(); }));
  }
  return counters;
}

const RegisterMeasurement kCapacity{
    {.name = "capacity", .what = "longest context and largest batch that a memory has room for (--memory, --check-capacity); on request",
     .on_request = true,
     .like_tokens = [](const Options& o, double tokens) { return 8.0 * static_cast<double>(std::max<int64_t>(o.prefill_chunk, 1024)) + 3 * tokens; },
     .new_tokens = [](const Options&) { return kSteps; }, .run = Capacity}};

}  // namespace

std::vector<int64_t> CacheTensors(const Spec& spec, const CacheShape& shape, int64_t capacity, at::ScalarType dtype,
                                  at::ScalarType computes) {
  const KvCache cache(spec, shape, capacity, dtype, at::Device(at::kMeta), computes);  // tensors without memory
  std::vector<int64_t> bytes;
  std::set<const void*> counted;  // some are views of one
  for (const at::Tensor& tensor : cache.Tensors()) {
    const at::Storage& memory = tensor.storage();
    if (counted.insert(memory.unsafeGetStorageImpl()).second) bytes.push_back(static_cast<int64_t>(memory.nbytes()));
  }
  if (spec.policy == Policy::kHf) bytes.push_back(KvBytesReserved(spec, shape, capacity, dtype));
  return bytes;
}

int64_t CacheTensorBytes(const Spec& spec, const CacheShape& shape, int64_t capacity, at::ScalarType dtype,
                         at::ScalarType computes) {
  const std::vector<int64_t> bytes = CacheTensors(spec, shape, capacity, dtype, computes);
  return std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
}

int64_t LargestThatFits(const std::function<double(int64_t)>& bytes, double memory, int64_t most) {
  int64_t fits = 0, fails = 1;  // the first that is not known to fit
  while (fails <= most && bytes(fails) <= memory) fits = fails, fails = 2 * fails;
  fails = std::min(fails, most + 1);
  while (fails - fits > 1) {
    const int64_t half = fits + (fails - fits) / 2;
    (bytes(half) <= memory ? fits : fails) = half;
  }
  return fits;
}

}  // namespace kvq
