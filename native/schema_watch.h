// A limit on the time of one call. For schema.cpp.
#pragma once

#include "internal.h"

#include <chrono>

#if defined(__linux__)
#include <time.h>
#endif

namespace trio {

// While it lives, `stop` is called from another thread once this thread has computed for `seconds`, and every hundredth
// of a second after that. Where the platform does not tell how long a thread has computed, the clock on the wall counts.
class Watch {
public:
    Watch(double seconds, std::function<void()> stop);
    ~Watch();
    Watch(const Watch &) = delete;
    Watch &operator=(const Watch &) = delete;
    void look(); // for the thread that watches

private:
    double limit_; // CPU seconds of this thread
    std::chrono::steady_clock::time_point deadline_;
    std::function<void()> stop_;
#if defined(__linux__)
    clockid_t clock_{};
    bool has_clock_ = false;
#endif
};

} // namespace trio
