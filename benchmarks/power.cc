// power: what decoding draws, and what a new token costs in energy, the prefill outside. The steps are those
// of `decode`. On a GPU from its own energy counter, or where it has none from the power that NVML reports, every
// 50 ms, of all GPUs together; on a CPU from RAPL, of whole packages. Idle is measured first, once for each model, with
// the model loaded, and given: watts_net and mj_per_token_net are without it. Where nothing counts energy there is no
// number.
//
// A GPU's energy counter advances in steps, of 0.1 s on an H200: a reading begins at a step and ends at the first one
// after the work (of several GPUs, at a step of one), less what the idle machine draws while nothing works. A sample is
// as many runs of --decode-tokens, one behind the other, as last three seconds, after a second of them that is not
// counted: what holds a GPU to its power limit takes most of a second to do so, and an H200 of 700 W draws 750 until then.
#include <map>
#include <memory>
#include <thread>

#include "benchmarks/decoding.h"
#include "fixtures/machine/rapl.h"

namespace kvq {
namespace {

// Energy and seconds of the work in the intervals since the last Take. What is not work, waiting for a counter's step
// and asking it, is taken to draw what the idle machine does.
class Meter {
 public:
  explicit Meter(Session& session) : session_(session) {
    if (session.watched()) return;
    if (session.device().is_cuda()) throw Skip(session.why_no_nvml());
    try {
      rapl_.emplace();
    } catch (const std::runtime_error& error) {
      throw Skip(error.what());
    }
  }

  void Begin() {
    AwaitStep();
    joules_before_ = Joules();
    began_ = Clock::now();
    if (session_.watched()) session_.BeginWatch();
  }
  // After so many seconds of work; without them all of the interval counts.
  void End(std::optional<double> worked = std::nullopt) {
    if (session_.watched()) session_.EndWatch();
    AwaitStep();
    const std::optional<double> now = Joules();
    const double all = SecondsSince(began_), counted = worked.value_or(all);
    if (now && joules_before_) {
      seen_.joules = seen_.joules.value_or(0) + *now - *joules_before_ - idle_watts_ * (all - counted);
    }
    seen_.seconds += counted;
  }
  GpuSummary Take() {
    GpuSummary seen = std::exchange(seen_, {});
    if (session_.watched()) {
      GpuSummary watched = session_.TakeWatch();
      if (watched.energy_counter) watched.joules = seen.joules, watched.seconds = seen.seconds;
      seen = watched;
    }
    if (!seen.joules) throw Skip("this GPU reports neither energy nor power");
    return seen;
  }
  void SetIdleWatts(double watts) { idle_watts_ = watts; }
  const char* Source(const GpuSummary& seen) const {
    if (!session_.watched()) return "energy by RAPL";
    return seen.energy_counter ? "energy by NVML's counter" : "power by NVML every 50 ms";
  }

 private:
  using Clock = std::chrono::steady_clock;
  static double SecondsSince(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

  // What the counters say, of all GPUs or packages; none where one of them has no counter.
  std::optional<double> Joules() {
    if (rapl_) return rapl_->Joules();
    double joules = 0;
    for (const auto& nvml : session_.nvml()) {
      const std::optional<double> one = nvml->Joules();
      if (!one) return std::nullopt;
      joules += *one;
    }
    return joules;
  }
  // Waits for the next step of the GPUs' counters, for half a second at most.
  void AwaitStep() {
    const Clock::time_point begin = Clock::now();
    const std::optional<double> before = session_.watched() ? Joules() : std::nullopt;
    while (before && Joules() == before && SecondsSince(begin) < 0.5) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

  Session& session_;
  std::optional<Rapl> rapl_;
  GpuSummary seen_;
  std::optional<double> joules_before_;
  double idle_watts_ = 0;
  Clock::time_point began_;
};

// Two seconds of nothing with the model loaded, measured once for each model.
GpuSummary Idle(Session& session, const Cell& cell, Meter& meter) {
  static std::map<std::string, GpuSummary> known;
  const auto found = known.find(cell.model);
  if (found != known.end()) return found->second;
  Synchronize(session.devices());
  // The power that NVML reports is a mean over a second: the warm-up's has to pass.
  std::this_thread::sleep_for(std::chrono::seconds(1));
  meter.Begin();
  std::this_thread::sleep_for(std::chrono::seconds(2));
  meter.End();
  return known[cell.model] = meter.Take();
}

Counters Power(Session& session, const Cell& cell, benchmark::State& state) {
  Meter meter(session);
  Decoding decoding(session, cell, session.options().decode_tokens);
  decoding.WarmUp();

  const GpuSummary idle = Idle(session, cell, meter);
  const double idle_watts = *idle.joules / idle.seconds;
  meter.SetIdleWatts(idle_watts);

  GpuSummary clocks;
  std::vector<double> watts, per_token, rates;
  Samples(session, state, [&] {
    double seconds = 0, tokens = 0;
    const auto work = [&](double at_least) {
      for (seconds = tokens = 0; seconds < at_least; tokens += decoding.tokens()) {
        const at::Tensor first = decoding.Start();
        Synchronize(session.devices());
        seconds += Time(session.devices(), [&] { decoding.Run(first); });
      }
    };
    work(1);
    meter.Begin();
    work(3);
    meter.End(seconds);
    const GpuSummary seen = meter.Take();
    clocks.AddState(seen);
    watts.push_back(*seen.joules / seen.seconds);
    per_token.push_back(*seen.joules * 1e3 / tokens);
    rates.push_back(tokens / seconds);
    return seconds / tokens;
  });
  decoding.CheckFinite();
  session.AddNote(meter.Source(idle));
  Counters counters;
  AddSpread(counters, "watts", watts);
  counters.emplace_back("watts_idle", idle_watts);
  counters.emplace_back("watts_net", counters[0].second - idle_watts);
  AddSpread(counters, "mj_per_token", per_token);
  for (size_t i = 0; i < per_token.size(); ++i) per_token[i] *= 1 - idle_watts / watts[i];
  AddSpread(counters, "mj_per_token_net", per_token);
  AddSpread(counters, "tokens_per_s", rates);
  AddGpuState(session, clocks, counters);
  return counters;
}

const RegisterMeasurement kPower{
    {.name = "power", .what = "watts and mJ of a new token while decoding, with and without the idle machine's",
     .timed = true, .new_tokens = [](const Options& o) { return o.decode_tokens; }, .run = Power}};

}  // namespace
}  // namespace kvq
