// Stops llguidance when it computes for too long. With some schemas one mask takes seconds, in spite of llguidance's
// own limits. All other streams would have to wait for it, since the mask is a part of their step.

#include "schema_watch.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <time.h>
#endif

using namespace trio;

namespace {

constexpr std::chrono::milliseconds ROUND{10};
constexpr int32_t MAX_IDLE_ROUNDS = 100; // then the thread sleeps: to wake it with every mask would cost more

class Watchdog {
public:
    void enter(Watch *watch) {
        std::lock_guard<std::mutex> lock(mutex_);
        watched_.push_back(watch);
        n_idle_rounds_ = 0;
        if (!asleep_) return;
        asleep_ = false;
        if (started_) {
            wake_.notify_one();
        } else {
            std::thread([this] { run(); }).detach(); // ends with the process
            started_ = true;
        }
    }

    void leave(Watch *watch) {
        std::lock_guard<std::mutex> lock(mutex_);
        watched_.erase(std::find(watched_.begin(), watched_.end(), watch));
    }

private:
    void run() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait_for(lock, ROUND);
            for (Watch *watch : watched_)
                watch->look();
            if (!watched_.empty() || ++n_idle_rounds_ < MAX_IDLE_ROUNDS) continue;
            asleep_ = true;
            wake_.wait(lock, [this] { return !asleep_; });
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<Watch *> watched_;
    int32_t n_idle_rounds_ = 0;
    bool started_ = false, asleep_ = true;
};

Watchdog &watchdog() {
    static auto *instance = new Watchdog; // never destroyed: its thread runs until the process ends
    return *instance;
}

} // namespace

Watch::Watch(double seconds, std::function<void()> stop)
    : limit_(thread_seconds() + seconds), stop_(std::move(stop)) {
#if defined(__linux__)
    has_clock_ = pthread_getcpuclockid(pthread_self(), &clock_) == 0;
#endif
    deadline_ = std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                                       std::chrono::duration<double>(seconds));
    watchdog().enter(this);
}

Watch::~Watch() {
    watchdog().leave(this);
}

void Watch::look() {
    if (std::chrono::steady_clock::now() < deadline_) return;
#if defined(__linux__)
    timespec now;
    if (has_clock_ && clock_gettime(clock_, &now) == 0 && double(now.tv_sec) + 1e-9 * double(now.tv_nsec) < limit_) {
        return; // other programs took the time
    }
#endif
    stop_();
}
