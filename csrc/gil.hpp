// The interpreter's lock, released while a binding computes, in a way that survives the interpreter's exit and a fork.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastcam {

// Calls of this module that run without the interpreter's lock.
//
// Until Python 3.14, a daemon thread that asks for the lock while the interpreter shuts down is ended by pthread_exit,
// which unwinds its stack. Unwinding through a destructor, here that of a guard that takes the lock again, ends the
// whole process (std::terminate). So before the interpreter shuts down, `close` waits for the calls under way and keeps
// other threads from starting new ones.
class OpenCalls {
public:
    static OpenCalls& of_module() {
        static OpenCalls& calls = *new OpenCalls;  // never destroyed: threads may still be held back at exit
        return calls;
    }

    // Both with the interpreter's lock held.
    void enter() {
        ++count_;
        if (!closing_ || std::this_thread::get_id() == closer_) return;
        leave();
        const pybind11::gil_scoped_release release;
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));  // until the process ends
    }
    void leave() { --count_; }

    void close() {
        closer_ = std::this_thread::get_id();
        closing_ = true;
        const pybind11::gil_scoped_release release;
        while (count_ != 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }

    // In a forked child, whose other threads are gone.
    void forget() { count_ = 0; }

private:
    std::atomic<int> count_{0};
    std::atomic<bool> closing_{false};
    std::thread::id closer_;  // written before `closing_`
};

// Releases the interpreter's lock for as long as it lives.
class Unlocked {
public:
    Unlocked() { OpenCalls::of_module().enter(); release_.emplace(); }
    ~Unlocked() {
        release_.reset();
        OpenCalls::of_module().leave();
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

private:
    std::optional<pybind11::gil_scoped_release> release_;
};

// Once, while the module is made: closes its calls before the interpreter shuts down.
inline void close_calls_at_exit() {
    pybind11::module_::import("atexit").attr("register")(
        pybind11::cpp_function([] { OpenCalls::of_module().close(); }));
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { OpenCalls::of_module().forget(); });
#endif
}

}  // namespace fastcam
