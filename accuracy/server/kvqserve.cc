// kvqserve: an OpenAI-compatible server for a model over a quantized KV cache (accuracy/completions.h).
//
// One thread, the first, runs the model. It answers so many requests side by side as there are slots (--parallel), each of
// which has a cache of its own: they take turns, a turn is a call of the model, of a piece of the prompt or of a token. Two
// are never computed in one call, whose sums would be in another order than that of the request alone; so every answer has
// the bits that it has without the others. Further requests wait in a queue, first come, first served, and one that finds
// the queue full is refused at once. Each connection has a thread that reads, checks and waits: a request that is wrong never
// reaches the queue. A client that goes away is noticed within a fifth of a second, and its request is dropped.
#include <sys/socket.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "accuracy/completions.h"
#include "accuracy/openai.h"
#include "accuracy/server/connection.h"
#include "accuracy/server/description.h"
#include "accuracy/server/flags.h"
#include "accuracy/server/jobs.h"
#include "benchmarks/commit.h"
#include "benchmarks/options.h"
#include "fixtures/machine/host_load.h"
#include "fixtures/machine/host_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "kernels/error.h"
#include "kernels/runtime/compiler.h"

namespace kvq {
namespace {

using namespace std::chrono_literals;

constexpr int64_t kMostContext = 8192;  // without --context

class App {
 public:
  App(const Flags& flags, Session& session) : flags_(flags), session_(session), queue_(static_cast<size_t>(flags.queue)) { SetUp(); }

  void Listen() {
    int port = static_cast<int>(flags_.port);
    if (port == 0) {
      port = http_.bind_to_any_port(flags_.host);
    } else if (!http_.bind_to_port(flags_.host, port)) {
      port = -1;
    }
    if (port < 0) {
      throw InputError("--host, --port: cannot listen on ", flags_.host, ":", flags_.port, "; is the port taken, or the address not this machine's?");
    }
    http_.WidenBacklog();
    const std::string host = flags_.host.find(':') == std::string::npos ? flags_.host : "[" + flags_.host + "]";
    std::cout << "kvqserve: listening on http://" << host << ":" << port << std::endl;
    listener_ = std::thread([this] {
      if (http_.listen_after_bind() || stopping_) return;
      std::cerr << "kvqserve: cannot take connections any more; the server ends" << std::endl;
      deaf_ = true;
      Stop();
    });
  }

  // Loads the model, then answers until Stop.
  void Run() {
    const c10::InferenceMode no_gradients;
    const ModelFiles files = FindModel(flags_.model);
    const Spec spec = ParseSpec(flags_.spec);
    const Backend& backend = FindBackend(flags_.backend);
    const Model& model = session_.model(flags_.model);
    const Tokenizer& tokenizer = session_.tokenizer(flags_.model);
    if (tokenizer.vocab_size() > model.config().vocab_size) {
      throw InputError(files.dir, "/tokenizer.json: has ", tokenizer.vocab_size(), " tokens, config.json says vocab_size ",
                       model.config().vocab_size, "; it belongs to another model");
    }
    const int64_t positions = model.config().max_position_embeddings;
    served_.context = flags_.context > 0 ? flags_.context : std::min(positions, kMostContext);
    if (served_.context > positions) {
      throw InputError("--context: ", served_.context, " tokens are more than the model's ", positions, " positions");
    }
    for (int64_t i = 0; i < flags_.parallel; ++i) {
      slots_.emplace_back(session_, model, tokenizer, backend, spec, served_.context, EndIds(files, tokenizer), flags_.reuse);
      cache_bytes_ += slots_.back().engine.CacheBytes();
    }
    served_.name = ModelLabel(files.name);
    served_.other_name = flags_.model;
    served_.vocab = model.config().vocab_size;
    served_.tokenizer = &tokenizer;
    description_ = Describe(files, spec, model, slots_.front().engine, flags_, session_.device().is_cuda(), Commit(), served_);
    ready_ = true;
    std::cerr << "kvqserve: ready: " << served_.kv.dump() << std::endl;
    for (;;) {
      while (running_ < flags_.parallel) {
        std::shared_ptr<Job> job = queue_.Pop(/*wait=*/running_ == 0);
        if (!job) break;
        Take(std::move(job));
      }
      if (running_ == 0) break;
      for (Slot& slot : slots_) {
        if (slot.job) Advance(slot);
      }
    }
  }

  void Stop() {
    stopping_ = true;
    queue_.Close();
  }

  void Close() {
    Stop();
    if (!listener_.joinable()) return;
    for (int i = 0; i < 1000 && !http_.is_running() && !deaf_; ++i) std::this_thread::sleep_for(1ms);  // stop would be lost
    http_.stop();
    listener_.join();
  }

  bool ready() const { return ready_; }
  bool deaf() const { return deaf_; }

 private:
  void SetUp() {
    http_.new_task_queue = [threads = flags_.parallel + flags_.queue + 32] { return new httplib::ThreadPool(static_cast<size_t>(threads)); };
    http_.set_tcp_nodelay(true);
    http_.set_payload_max_length(static_cast<size_t>(flags_.body_mib) << 20);
    http_.set_read_timeout(10s);
    http_.set_write_timeout(10s);
    http_.set_keep_alive_max_count(1000000);
    // Not httplib's SO_REUSEPORT, by which two servers would share a port.
    http_.set_socket_options([](int socket) {
      const int yes = 1;
      ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
    http_.set_logger(EndConnection);
    http_.set_pre_routing_handler([this](const httplib::Request& request, httplib::Response& response) {
      const bool ranged = request.has_header("Range");
      // httplib would read the body of a request that nobody answers, of whatever size.
      const bool known = request.method == "GET" || request.method == "HEAD" || request.method == "OPTIONS" ||
                         (request.method == "POST" && posts_.contains(request.path));
      if (!ranged && known) return httplib::Server::HandlerResponse::Unhandled;
      ForgetRanges(request);
      CloseBehind(response);
      response.status = ranged ? 400 : 404;
      if (ranged) response.set_content(ErrorJson(400, "answers are not given in ranges; leave the header Range out"), "application/json");
      return httplib::Server::HandlerResponse::Handled;
    });
    http_.set_error_handler([](const httplib::Request& request, httplib::Response& response) {
      ForgetRanges(request);
      if (!response.body.empty()) return;
      const std::string what = response.status == 404   ? StrCat("there is no ", request.method, " ", request.path.substr(0, 100))
                               : response.status == 413 ? "the request is larger than this server takes"
                                                        : "the request is no HTTP that this server understands";
      response.set_content(ErrorJson(response.status, what), "application/json");
    });
    http_.set_exception_handler([](const httplib::Request&, httplib::Response& response, std::exception_ptr exception) {
      try {
        std::rethrow_exception(exception);
      } catch (const ApiError& error) {
        response.status = error.status;
        if (error.status == 503) response.set_header("Retry-After", "1");
        response.set_content(ErrorJson(error.status, error.what(), error.param), "application/json");
      } catch (const std::exception& error) {
        response.status = 500;
        response.set_content(ErrorJson(500, error.what()), "application/json");
      }
    });
    http_.Get("/health", [this](const httplib::Request&, httplib::Response& response) { Health(response); });
    Route("/v1/models", [this] { return description_.models; });
    Route("/tokenizer_info", [this] { return description_.tokenizer_info; });
    RoutePost("/tokenize", [this](const std::string& body) { return TokenizeJson(body, served_); });
    RoutePost("/detokenize", [this](const std::string& body) { return DetokenizeJson(body, served_); });
    RouteQuery("/v1/completions", ParseCompletion);
    RouteQuery("/v1/chat/completions", ParseChat);
  }

  void CheckReady() const {
    if (!ready_) throw ApiError(503, "the model is being loaded");
  }

  void Route(const std::string& path, std::function<OrderedJson()> answer) {
    http_.Get(path, [this, answer](const httplib::Request&, httplib::Response& response) {
      CheckReady();
      response.set_content(answer().dump(), "application/json");
    });
  }

  // The body, bounded also where no length was announced, which httplib does not do.
  std::string ReadBody(const httplib::Request& request, const httplib::ContentReader& reader, httplib::Response& response) const {
    if (request.is_multipart_form_data()) {
      CloseBehind(response);
      throw ApiError(400, "the body must be JSON");
    }
    const size_t most = static_cast<size_t>(flags_.body_mib) << 20;
    std::string body;
    bool large = false;
    const bool whole = reader([&](const char* data, size_t size) {
      large = body.size() + size > most;
      if (!large) body.append(data, size);
      return !large;
    });
    if (!whole) {
      CloseBehind(response);
      large = large || response.status == 413;  // announced so
      throw ApiError(large ? 413 : 400, large ? StrCat("the body is larger than ", flags_.body_mib, " MiB") : "the body is broken off, or no HTTP");
    }
    CheckReady();
    return body;
  }

  void RoutePost(const std::string& path, std::function<OrderedJson(const std::string&)> answer) {
    posts_.insert(path);
    http_.Post(path, [this, answer](const httplib::Request& request, httplib::Response& response, const httplib::ContentReader& reader) {
      const OrderedJson json = answer(ReadBody(request, reader, response));
      response.set_content(json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace), "application/json");
    });
  }

  void RouteQuery(const std::string& path, std::function<ApiQuery(const std::string&, const Served&)> parse) {
    posts_.insert(path);
    http_.Post(path, [this, parse](const httplib::Request& request, httplib::Response& response, const httplib::ContentReader& reader) {
      const auto job = std::make_shared<Job>(parse(ReadBody(request, reader, response), served_));
      size_t dropped = 0;
      const Queue::Pushed pushed = queue_.Push(job, dropped);
      if (dropped > 0) {
        const std::lock_guard lock(counts_);
        cancelled_ += static_cast<int64_t>(dropped);
      }
      if (pushed == Queue::Pushed::kClosed) throw ApiError(503, "the server ends");
      if (pushed == Queue::Pushed::kFull) {
        ++refused_;
        throw ApiError(503, StrCat(flags_.queue, " requests are waiting; try again later"));
      }
      const int socket = SocketOf(request);
      if (job->query.stream) {
        response.set_header("Cache-Control", "no-cache");
        response.set_chunked_content_provider(
            "text/event-stream",
            [job, socket](size_t, httplib::DataSink& sink) {
              std::string events, body;
              int status = 0;
              const bool whole = job->Wait(events, status, body);
              if ((!events.empty() && !sink.write(events.data(), events.size())) || (!whole && IsClosed(socket))) return false;
              if (!whole) return true;
              // It began as a success: an error can only be an event.
              if (status != 200) body = "data: " + body + "\n\ndata: [DONE]\n\n";
              if (!body.empty() && !sink.write(body.data(), body.size())) return false;
              sink.done();
              return true;
            },
            [job](bool) { job->gone = true; });
        return;
      }
      std::string events, body;
      int status = 0;
      while (!job->Wait(events, status, body)) {
        if (!IsClosed(socket)) continue;
        job->gone = true;
        status = 499, body = ErrorJson(499, "the client is gone");  // nobody reads it
        break;
      }
      response.status = status;
      if (status == 503) response.set_header("Retry-After", "1");
      response.set_content(body, "application/json");
    });
  }

  void Health(httplib::Response& response) {
    const bool ready = ready_;
    response.status = ready ? 200 : 503;
    OrderedJson health = {{"status", ready ? "ok" : "loading"}};
    if (ready) {
      const std::lock_guard lock(counts_);
      health.update({{"slots", flags_.parallel}, {"running", running_.load()}, {"cache_bytes", cache_bytes_},
                     {"waiting", queue_.size()}, {"answered", answered_}, {"refused", refused_.load()}, {"cancelled", cancelled_},
                     {"failed", failed_}, {"sequences", sequences_},
                     {"encoded_share", sequences_ > 0 ? OrderedJson(share_ / static_cast<double>(sequences_)) : OrderedJson()}});
    }
    response.set_content(health.dump(), "application/json");
  }

  // Where a request is answered.
  struct Slot {
    template <typename... Arguments>
    explicit Slot(Arguments&&... arguments) : engine(std::forward<Arguments>(arguments)...) {}

    CompletionEngine engine;
    std::shared_ptr<Job> job;  // null: free
    std::optional<CompletionEvents> events;
    std::vector<Completion> answers;  // of its prompts that are done
    bool begun = false;               // the next one
    int64_t last = 0;                 // of the requests, by number
  };

  // On the model's thread, as all of the slots: the free slot that has most of the prompt already, of those the one that
  // was used longest ago.
  void Take(std::shared_ptr<Job> job) {
    Slot* best = nullptr;
    for (Slot& slot : slots_) {
      if (slot.job) continue;
      const auto rank = [&](const Slot& one) { return std::pair(one.engine.Reusable(job->query.prompts.front().query), -one.last); };
      if (best == nullptr || rank(slot) > rank(*best)) best = &slot;
    }
    best->job = std::move(job);
    best->events.emplace(best->job->query, served_);
    best->answers.clear();
    best->begun = false;
    best->last = ++taken_;
    ++running_;
  }

  // A turn: one call of the model for the slot's request.
  void Advance(Slot& slot) {
    Job& job = *slot.job;
    const ApiQuery& query = job.query;
    const size_t i = slot.answers.size();
    try {
      if (job.gone || stopping_) throw Cancelled();
      if (!std::exchange(slot.begun, true)) slot.engine.Begin(query.prompts[i].query);
      CompletionEngine::OnPart send;
      if (query.stream) send = [&](const Completion& so_far, const CompletionPart& part) { job.Send(slot.events->Part(i, so_far, part)); };
      if (!slot.engine.Step(send)) return;
      slot.answers.push_back(slot.engine.End());
      slot.begun = false;
      if (query.stream) job.Send(slot.events->End(i, slot.answers.back()));
      if (slot.answers.size() < query.prompts.size()) return;
      if (query.stream) {
        job.Finish(200, slot.events->Done(slot.answers));
      } else {
        OrderedJson json = CompletionJson(query, served_, slot.answers);
        job.Finish(200, json.dump(-1, ' ', false, OrderedJson::error_handler_t::replace));
      }
      const std::lock_guard lock(counts_);
      ++answered_;
      for (const Completion& answer : slot.answers) ++sequences_, share_ += answer.encoded_share;
    } catch (const Cancelled&) {
      job.Finish(503, ErrorJson(503, "the server ends"));  // or nobody reads it
      const std::lock_guard lock(counts_);
      ++cancelled_;
    } catch (const std::exception& error) {
      const std::string what = IsOutOfMemory(error) ? "out of memory: " + OutOfMemoryText(error, session_.devices()) : error.what();
      std::cerr << "kvqserve: " << what << std::endl;
      job.Finish(500, ErrorJson(500, what));
      const std::lock_guard lock(counts_);
      ++failed_;
    }
    slot.events.reset();
    slot.job.reset();
    --running_;
  }

  const Flags& flags_;
  Session& session_;
  HttpServer http_;
  std::thread listener_;
  std::set<std::string> posts_;  // paths
  Queue queue_;
  Served served_;  // not written once ready_ is set
  Description description_;  // likewise
  std::atomic<bool> ready_ = false, stopping_ = false, deaf_ = false;
  std::atomic<int64_t> refused_ = 0, running_ = 0;
  std::deque<Slot> slots_;     // of the model's thread
  int64_t taken_ = 0;          // likewise
  int64_t cache_bytes_ = 0;    // not written once ready_ is set
  std::mutex counts_;
  int64_t answered_ = 0, cancelled_ = 0, failed_ = 0, sequences_ = 0;
  double share_ = 0;
};

// Says what is being thrown; the exit code for it.
int Failed() {
  try {
    throw;
  } catch (const InputError& error) {
    std::fprintf(stderr, "kvqserve: %s\n", error.what());
    return 2;
  } catch (const std::filesystem::filesystem_error& error) {
    std::fprintf(stderr, "kvqserve: %s: %s\n", error.path1().c_str(), error.code().message().c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvqserve: %s\n", error.what());
    return 1;
  }
}

int Main(int argc, char** argv) {
  const Flags flags = ParseFlags({argv + 1, argv + argc});
  if (flags.help) {
    std::cout << kServerHelp;
    return 0;
  }
  // What can be wrong with the input is said before a port is taken.
  const ModelFiles files = FindModel(flags.model);
  if (files.random_weights()) throw InputError("--model: ", flags.model, " has random weights and no tokenizer; give a directory with a real model");
  const Spec spec = ParseSpec(flags.spec);
  CheckSpec(spec, CacheShapeOf(files.config(), 1));
  FindBackend(flags.backend);
  Options options;
  options.models = {flags.model};
  options.device = flags.device, options.dtype = flags.dtype, options.kv_dtype = flags.kv_dtype;

  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGINT);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGUSR1);  // our own, to the thread below
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);  // in all threads that begin from here on: a session's too

  Session session(options);
  if (flags.host != "127.0.0.1" && flags.host != "::1" && flags.host != "localhost") {
    std::cerr << "kvqserve: warning: on " << flags.host << " others may reach this server, which asks nobody who they are" << std::endl;
  }
  LimitMemory();
  KeepFreedMemory();

  App app(flags, session);
  std::thread signals([&] {
    int signal = 0;
    sigwait(&ends, &signal);
    if (signal != SIGUSR1 && !app.ready()) std::_Exit(0);  // nothing has begun
    app.Stop();
  });
  int code = 0;
  try {
    app.Listen();
    OnCompiling([](const std::string& line) { std::cerr << "kvqserve: " << line << std::endl; });
    app.Run();
    if (app.deaf()) code = 1;
  } catch (...) {
    code = Failed();
  }
  pthread_kill(signals.native_handle(), SIGUSR1);
  signals.join();
  // Connections are given time to end, but a client that reads slowly could take for ever: until then, or a second signal.
  std::thread last([&] {
    const timespec most = {.tv_sec = 10, .tv_nsec = 0};
    int signal;
    do signal = sigtimedwait(&ends, nullptr, &most);
    while (signal < 0 && errno == EINTR);  // stopped and continued
    if (signal != SIGUSR1) std::_Exit(code);
  });
  app.Close();
  pthread_kill(last.native_handle(), SIGUSR1);
  last.join();
  return code;
}

}  // namespace
}  // namespace kvq

[[gnu::section(".preinit_array"), gnu::used]] void (*const kBeforeAll)(int, char**, char**) = kvq::LimitSpinning;

int main(int argc, char** argv) {
  try {
    kvq::Leave(kvq::Main(argc, argv));
  } catch (...) {
    kvq::Leave(kvq::Failed());
  }
}
