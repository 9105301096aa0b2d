#include "thread_pool.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastcam {

class ThreadPool::Job {
public:
    Job(std::size_t tasks, const std::function<void(std::size_t)>& body) : tasks_(tasks), body_(body) {}

    // Takes tasks until none is left. `body_` is accessed only after claiming a task, hence while wait() still blocks.
    void work() {
        for (std::size_t task = next_++; task < tasks_; task = next_++) {
            try {
                body_(task);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
            }
            if (++done_ == tasks_) {
                const std::lock_guard<std::mutex> lock(mutex_);
                all_done_.notify_all();
            }
        }
    }

    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        all_done_.wait(lock, [this] { return done_ == tasks_; });
        // Taken out: the last worker to leave destroys the job while the caller may still look at the exception.
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

private:
    const std::size_t tasks_;
    const std::function<void(std::size_t)>& body_;
    std::atomic<std::size_t> next_{0};
    std::atomic<std::size_t> done_{0};
    std::mutex mutex_;
    std::condition_variable all_done_;
    std::exception_ptr error_;
};

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
    }
    work_arrived_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(std::size_t tasks, std::size_t threads, const std::function<void(std::size_t)>& body) {
    const std::size_t team = std::min(tasks, threads);
    if (team <= 1) {
        for (std::size_t task = 0; task < tasks; ++task) body(task);
        return;
    }
    const auto job = std::make_shared<Job>(tasks, body);
    enlist(job, team - 1);
    job->work();
    job->wait();
}

void ThreadPool::enlist(const std::shared_ptr<Job>& job, std::size_t helpers) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        try {
            while (workers_.size() < helpers) workers_.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            // The system grants no more threads: the existing ones and the caller do the work.
        }
        queue_.insert(queue_.end(), std::min(helpers, workers_.size()), job);
    }
    if (helpers == 1) {
        work_arrived_.notify_one();
    } else {
        work_arrived_.notify_all();
    }
}

void ThreadPool::work() {
    for (;;) {
        std::unique_lock<std::mutex> lock(mutex_);
        work_arrived_.wait(lock, [this] { return closing_ || !queue_.empty(); });
        if (queue_.empty()) return;
        const std::shared_ptr<Job> job = std::move(queue_.front());
        queue_.pop_front();
        lock.unlock();
        job->work();
    }
}

namespace {

// Never destroyed: a thread may still compute while the process's static objects are torn down.
std::unique_ptr<ThreadPool>& pool_of_process() {
    static auto& pool = *new std::unique_ptr<ThreadPool>(std::make_unique<ThreadPool>());
    return pool;
}

#if defined(__unix__) || defined(__APPLE__)
// The parent's pool is abandoned, not destroyed: its threads do not exist here and its mutex may be held forever.
void replace_pool_in_child() {
    static_cast<void>(pool_of_process().release());
    pool_of_process() = std::make_unique<ThreadPool>();
}
#endif

}  // namespace

ThreadPool& ThreadPool::of_process() {
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, replace_pool_in_child);
    static_cast<void>(registered);
#endif
    return *pool_of_process();
}

std::size_t processor_count() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        return std::max<std::size_t>(1, static_cast<std::size_t>(CPU_COUNT(&allowed)));
    }
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace fastcam
