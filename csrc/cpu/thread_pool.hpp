// A small pool of threads that live as long as the process; the calling thread always takes part.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastcam {

class ThreadPool {
public:
    ThreadPool() = default;
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // Calls body(0) ... body(tasks - 1), each once, on at most `threads` threads, and returns when all have finished.
    // May be called from many threads at once. The first exception of a task is rethrown here; the others still run.
    void run(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& body);

    // The pool of this process. A forked child gets a new one: threads do not survive a fork.
    static ThreadPool& of_process();

private:
    class Job;

    void enlist(const std::shared_ptr<Job>& job, std::size_t helpers);
    void work();

    std::mutex mutex_;
    std::condition_variable work_arrived_;
    std::deque<std::shared_ptr<Job>> queue_;
    std::vector<std::thread> workers_;
    bool closing_ = false;
};

// Processors that this process may use.
std::size_t processor_count();

}  // namespace fastcam
