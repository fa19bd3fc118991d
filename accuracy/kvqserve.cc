// kvqserve: an OpenAI-compatible server for a model over a quantized KV cache (accuracy/completions.h).
//
// One thread, the first, runs the model. It answers so many requests side by side as there are slots (--parallel), each of
// which has a cache of its own: they take turns, a turn is a call of the model, of a piece of the prompt or of a token. Two
// are never computed in one call, whose sums would be in another order than that of the request alone; so every answer has
// the bits that it has without the others. Further requests wait in a queue, first come, first served, and one that finds
// the queue full is refused at once. Each connection has a thread that reads, checks and waits: a request that is wrong never
// reaches the queue. A client that goes away is noticed within a fifth of a second, and its request is dropped.
#include <arpa/inet.h>
#include <httplib.h>
#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <condition_variable>
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
#include "benchmarks/options.h"
#include "fixtures/machine/host_load.h"
#include "fixtures/machine/host_memory.h"
#include "fixtures/machine/out_of_memory.h"
#include "fixtures/tokenizer/tokenizer_json.h"
#include "kernels/error.h"
#include "kernels/file.h"
#include "kernels/runtime/compiler.h"

namespace kvq {
namespace {

using nlohmann::json;
using namespace std::chrono_literals;

struct Flags {
  std::string model = "smollm2-135m", spec = "none", backend = "sdpa";
  std::string device = "cpu", dtype = "auto", kv_dtype = "auto";
  std::string host = "127.0.0.1";
  int64_t context = 0, port = 8000, parallel = 1, queue = 64, body_mib = 8;
  bool reuse = true, help = false;
};

constexpr int64_t kMostContext = 8192;  // without --context

const char kHelp[] =
    "kvqserve serves a model over a quantized KV cache as OpenAI's API does, in the shapes of vLLM.\n\n"
    "usage: kvqserve [flags]\n\n"
    "flags (default)\n"
    "  --model=NAME      as kvqbench's --models: a catalogue's name, a Hugging Face directory, a GGUF file (smollm2-135m)\n"
    "  --spec=SPEC       how the cache is stored: a spec or a preset, as one of kvqbench's --schemes (none)\n"
    "  --backend=NAME    who computes attention (sdpa)\n"
    "  --device=DEVICE   cpu, cuda, cuda:1, cuda:0,1 (cpu)\n"
    "  --dtype=TYPE      float32, float16, bfloat16; auto: the faster one here (auto)\n"
    "  --kv-dtype=TYPE   what tokens that are not encoded are stored in (auto)\n"
    "  --context=N       tokens of prompt and answer together, for which the cache has room (the model's, at most 8192)\n"
    "  --host=ADDRESS    where to listen; others than this machine reach it only if you say so (127.0.0.1)\n"
    "  --port=N          0: a free one (8000)\n"
    "  --parallel=N      requests that are answered side by side, each with a cache of its own; the answers are the same (1)\n"
    "  --queue=N         requests that may wait; one more is refused with 503 (64)\n"
    "  --body-mib=N      MiB that a request may have; a larger one is refused with 413 (8)\n"
    "  --no-reuse        reads every prompt anew, also what it has in common with the one before; the answers are the same\n\n"
    "POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize; GET /v1/models, /health, /tokenizer_info\n\n"
    "exit code: 0 ended by SIGINT or SIGTERM, 2 bad input\n";

Flags ParseFlags(const std::vector<std::string>& arguments) {
  Flags flags;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    if (argument == "--help" || argument == "-h") {
      flags.help = true;
      continue;
    }
    if (argument == "--no-reuse") {
      flags.reuse = false;
      continue;
    }
    const std::map<std::string, std::string*> texts = {{"--model", &flags.model}, {"--spec", &flags.spec}, {"--backend", &flags.backend},
        {"--device", &flags.device}, {"--dtype", &flags.dtype}, {"--kv-dtype", &flags.kv_dtype}, {"--host", &flags.host}};
    const std::map<std::string, std::pair<int64_t*, int64_t>> numbers = {{"--context", {&flags.context, 2}}, {"--port", {&flags.port, 0}},
        {"--parallel", {&flags.parallel, 1}}, {"--queue", {&flags.queue, 1}}, {"--body-mib", {&flags.body_mib, 1}}};
    const auto text = texts.find(name);
    const auto number = numbers.find(name);
    if (text == texts.end() && number == numbers.end()) throw InputError(name, ": no such flag; --help lists them");
    if (equals == std::string::npos && i + 1 == arguments.size()) throw InputError(name, ": wants a value");
    const std::string value = equals == std::string::npos ? arguments[++i] : argument.substr(equals + 1);
    if (!IsUtf8(value)) throw InputError(name, ": not UTF-8, which answers could not say");
    if (text != texts.end()) {
      if (value.empty()) throw InputError(name, ": wants a value");
      *text->second = value;
    } else {
      *number->second.first = WholeNumber(name, value, number->second.second);
    }
  }
  if (flags.port > 65535) throw InputError("--port: a whole number from 0 to 65535, not '", flags.port, "'");
  if (flags.parallel > 256) throw InputError("--parallel: at most 256, since each has a cache; not '", flags.parallel, "'");
  if (flags.queue > 4096) throw InputError("--queue: at most 4096, since each waiting request has a thread; not '", flags.queue, "'");
  if (flags.body_mib > 1024) throw InputError("--body-mib: at most 1024, not '", flags.body_mib, "'");
  return flags;
}

// A request on its way: the thread of its connection waits, that of the model answers.
class Job {
 public:
  explicit Job(ApiQuery query) : query(std::move(query)) {}

  const ApiQuery query;
  std::atomic<bool> gone = false;  // nobody waits any more

  void Send(std::string event) {
    const std::lock_guard lock(mutex_);
    events_ += event;
    changed_.notify_one();
  }
  void Finish(int status, std::string body = "") {
    const std::lock_guard lock(mutex_);
    status_ = status, body_ = std::move(body);
    changed_.notify_one();
  }
  // Waits up to a tenth of a second for what is there to be sent. True once all is there.
  bool Wait(std::string& events, int& status, std::string& body) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, 100ms, [&] { return status_ != 0 || !events_.empty(); });
    events = std::exchange(events_, {});
    status = status_, body = body_;
    return status_ != 0;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string events_, body_;
  int status_ = 0;
};

class Queue {
 public:
  explicit Queue(size_t most) : most_(most) {}
  enum class Pushed { kYes, kFull, kClosed };
  // Where the queue is full, those that nobody waits for any more make room: `dropped` of them.
  Pushed Push(const std::shared_ptr<Job>& job, size_t& dropped) {
    const std::lock_guard lock(mutex_);
    if (closed_) return Pushed::kClosed;
    if (jobs_.size() >= most_) dropped = std::erase_if(jobs_, [](const auto& waiting) { return waiting->gone.load(); });
    if (jobs_.size() >= most_) return Pushed::kFull;
    jobs_.push_back(job);
    changed_.notify_one();
    return Pushed::kYes;
  }
  // Waits for one if it is to. Null where there is none, and once the queue is closed.
  std::shared_ptr<Job> Pop(bool wait) {
    std::unique_lock lock(mutex_);
    if (wait) changed_.wait(lock, [&] { return closed_ || !jobs_.empty(); });
    if (closed_ || jobs_.empty()) return nullptr;
    std::shared_ptr<Job> job = jobs_.front();
    jobs_.pop_front();
    return job;
  }
  // Those that waited get no answer any more.
  void Close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    for (const auto& job : jobs_) job->Finish(503, ErrorJson(503, "the server ends"));
    jobs_.clear();
    changed_.notify_all();
  }
  size_t size() const {
    const std::lock_guard lock(mutex_);
    return jobs_.size();
  }

 private:
  const size_t most_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Job>> jobs_;
  bool closed_ = false;
};

// The socket of the connection that a request came by, which httplib does not hand out: it is the one whose other end is
// the client's. While the request is being answered it stays open, so the number stays its own. -1 where it is not found.
int SocketOf(const httplib::Request& request) {
  const std::string port = std::to_string(request.remote_port);
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", none)) {
    const int socket = std::atoi(entry.path().filename().c_str());
    sockaddr_storage peer = {};
    socklen_t size = sizeof peer;
    char host[NI_MAXHOST], service[NI_MAXSERV];
    if (::getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &size) != 0) continue;
    if (::getnameinfo(reinterpret_cast<sockaddr*>(&peer), size, host, sizeof host, service, sizeof service,
                      NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
      continue;
    }
    if (request.remote_addr == host && port == service) return socket;
  }
  return -1;
}

// A client that has closed its sending half alone counts as gone too: httplib would not write to it either. What it sent
// before, and nobody has read, does not hide its end.
bool IsClosed(int socket) {
  if (socket < 0) return false;
  pollfd end = {.fd = socket, .events = POLLRDHUP, .revents = 0};
  return ::poll(&end, 1, 0) > 0 && (end.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

// A connection on which a request's body is left unread ends with the answer: what is left would be read as the next
// request. httplib asks the request alone whether to close; EndConnection does once the answer is written.
void CloseBehind(httplib::Response& response) { response.set_header("Connection", "close"); }

void EndConnection(const httplib::Request& request, const httplib::Response& response) {
  if (response.get_header_value("Connection") != "close") return;
  const int socket = SocketOf(request);
  if (socket < 0) return;
  ::shutdown(socket, SHUT_RDWR);
  char unread[4096];
  while (::recv(socket, unread, sizeof unread, MSG_DONTWAIT) > 0) {  // still readable behind the shutdown
  }
}

// httplib would cut any answer by the request's ranges, or repeat it for each of thousands.
void ForgetRanges(const httplib::Request& request) { const_cast<httplib::Request&>(request).ranges.clear(); }

// httplib's server with a queue of the system's that holds more than its five connections.
class HttpServer : public httplib::Server {
 public:
  void WidenBacklog() { ::listen(svr_sock_, 1024); }
};

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
    Describe(files, spec, model, slots_.front().engine);
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
    Route("/v1/models", [this] { return models_; });
    Route("/tokenizer_info", [this] { return tokenizer_info_; });
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

  // With which tokens the model ends a text: the tokenizer's, and what config.json and generation_config.json say.
  static std::vector<int32_t> EndIds(const ModelFiles& files, const Tokenizer& tokenizer) {
    std::set<int32_t> ids;
    if (tokenizer.eos_id()) ids.insert(*tokenizer.eos_id());
    for (const char* name : {"config.json", "generation_config.json"}) {
      const std::string path = files.dir + "/" + name;
      if (!std::filesystem::exists(path)) continue;
      const json config = json::parse(ReadFile(path), nullptr, /*allow_exceptions=*/false);
      const json& eos = Member(config, "eos_token_id");
      for (const json& id : eos.is_array() ? eos : json::array({eos})) {
        if (id.is_number_unsigned()) ids.insert(TokenId(id, path));
      }
    }
    return {ids.begin(), ids.end()};
  }

  void Describe(const ModelFiles& files, const Spec& spec, const Model& model, const CompletionEngine& engine) {
    const auto both = [](const auto& keys, const auto& values) { return keys == values ? StrCat(keys) : StrCat(keys, "+", values); };
    served_.kv = {{"spec", spec.text}};
    if (!spec.meaning.empty()) served_.kv["meaning"] = spec.meaning;
    served_.kv.update({{"residual", both(spec.keys.residual_length, spec.values.residual_length)}, {"sinks", spec.sink_tokens},
                       {"call_tokens", spec.CallTokens()}, {"dtype", c10::toString(model.dtype())},
                       {"kv_dtype", c10::toString(model.kv_dtype())}, {"device", session_.device().is_cuda() ? "cuda" : "cpu"},
                       {"backend", flags_.backend}, {"ran", engine.ran()}, {"reuse", flags_.reuse && spec.policy != Policy::kHf}});
    const std::string path = files.dir + "/tokenizer_config.json";
    OrderedJson config = OrderedJson::object();
    if (std::filesystem::exists(path)) config = OrderedJson::parse(ReadFile(path));
    tokenizer_info_ = TokenizerInfoJson(config, *served_.tokenizer);
    ReadChatTemplate(files);
    OrderedJson meta = served_.kv;
    meta.update({{"commit", KVQ_COMMIT}, {"model_sha256", ModelSha256(files)}, {"tokenizer_sha256", TokenizerSha256(files.dir)},
                 {"n_vocab", served_.vocab}, {"n_ctx_train", model.config().max_position_embeddings}});
    const std::time_t now = std::time(nullptr);
    models_ = {{"object", "list"},
               {"data", OrderedJson::array({{{"id", served_.name}, {"object", "model"}, {"created", now}, {"owned_by", "kvqbench"},
                                             {"root", served_.name}, {"parent", nullptr}, {"max_model_len", served_.context},
                                             {"permission", OrderedJson::array()}, {"meta", meta}}})}};
  }

  void ReadChatTemplate(const ModelFiles& files) {
    const auto text = [&](const char* key) {
      const OrderedJson value = tokenizer_info_.value(key, OrderedJson());
      return value.is_string() ? value.get<std::string>() : "";
    };
    served_.bos = text("bos_token"), served_.eos = text("eos_token");
    std::string chat = text("chat_template");
    const OrderedJson named = tokenizer_info_.value("chat_template", OrderedJson());
    for (const OrderedJson& one : named.is_array() ? named : OrderedJson::array()) {  // several by name
      if (one.is_object() && one.value("name", "") == "default") chat = one.value("template", "");
    }
    const std::string path = files.dir + "/chat_template.jinja";  // where newer models have it
    if (chat.empty() && std::filesystem::exists(path)) chat = ReadFile(path);
    if (!chat.empty()) tokenizer_info_["chat_template"] = chat;
    served_.chat = FindChatTemplate(chat);
    if (served_.chat != nullptr) return;
    std::string known;
    for (const ChatTemplate& one : ChatTemplates()) known += (known.empty() ? "" : ", ") + one.name;
    served_.no_chat = chat.empty() ? "this model has no chat template; /v1/completions takes a prompt as it is"
                                   : StrCat("this model's chat template (sha256 ", ChatTemplateSha256(chat), ") is none of those known: ", known);
  }

  const Flags& flags_;
  Session& session_;
  HttpServer http_;
  std::thread listener_;
  std::set<std::string> posts_;  // paths
  Queue queue_;
  Served served_;  // not written once ready_ is set
  OrderedJson models_, tokenizer_info_;  // likewise
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
    std::cout << kHelp;
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

int main(int argc, char** argv) {
  kvq::LimitSpinning(argv);
  try {
    return kvq::Main(argc, argv);
  } catch (...) {
    return kvq::Failed();
  }
}
