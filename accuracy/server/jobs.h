// Requests on their way from the threads of their connections to that of the model.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "accuracy/openai.h"

namespace kvq {

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
    changed_.wait_for(lock, std::chrono::milliseconds(100), [&] { return status_ != 0 || !events_.empty(); });
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

}  // namespace kvq
