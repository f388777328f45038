// The library as a whole: errors, asserts, the log, backends. See trio_llama.h for what each function promises.

#include "internal.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>

#include "ggml-backend.h"
#include "ggml.h"
#include "mtmd-helper.h"

#ifdef _WIN32
#include <windows.h>
#else
#include <pthread.h>
#include <time.h>
#endif

namespace trio {

// ---- errors and asserts --------------------------------------------------------------------------------------------

namespace {

constexpr size_t MAX_ERROR_BYTES = 2048;

// Stacks are virtual memory: only the part that is touched takes memory. The recursion of std::regex takes more stack
// for a byte of text than anything else that was measured: 80 bytes and more.
constexpr size_t BIG_STACK_BYTES = size_t(256) << 20;
constexpr size_t STACK_BYTES_PER_INPUT_BYTE = 256;
constexpr size_t LEAST_BIG_STACK_BYTES = size_t(16) << 20;

thread_local int scope_depth = 0;
thread_local bool scope_assert_fired = false;
thread_local std::string scope_errors;
thread_local int warnings_expected = 0;
thread_local std::string last_error;

// ggml calls abort() when this returns. Throwing instead is sound only on a thread that has a guard, which worker
// threads have not, and where every frame between here and the guard can unwind: so C files are compiled with
// -fexceptions.
void on_ggml_abort(const char *message) {
    if (scope_depth > 0) {
        scope_assert_fired = true;
        throw Assert(message);
    }
    std::fprintf(stderr, "error: %s\n", message);
}

} // namespace

void check(bool condition, const char *message) {
    if (!condition) throw Refused(message);
}

Scope::Scope() {
    if (scope_depth++ == 0) {
        scope_assert_fired = false;
        scope_errors.clear();
    }
}

Scope::~Scope() {
    --scope_depth;
}

bool Scope::assert_fired() {
    return scope_assert_fired;
}

std::string Scope::errors() {
    return scope_errors;
}

ExpectWarnings::ExpectWarnings() {
    ++warnings_expected;
}

ExpectWarnings::~ExpectWarnings() {
    --warnings_expected;
}

void set_last_error(const std::string &message) {
    last_error = message;
}

int32_t translate_exception() noexcept {
    try {
        try {
            throw;
        } catch (const Failure &failure) {
            set_last_error(failure.what());
            return failure.code;
        } catch (const Assert &failure) {
            set_last_error(std::string("assert failed: ") + failure.what());
            return TRIO_E_ASSERT;
        } catch (const std::bad_alloc &) {
            set_last_error("out of memory");
            return TRIO_E_NATIVE;
        } catch (const std::exception &failure) {
            set_last_error(failure.what());
            return TRIO_E_NATIVE;
        } catch (...) {
            set_last_error("unknown C++ exception");
            return TRIO_E_NATIVE;
        }
    } catch (...) { // no memory even for the message
        return TRIO_E_NATIVE;
    }
}

int32_t copy_text(const std::string &text, char *buffer, int32_t size) {
    if (buffer != nullptr && size > 0) {
        const size_t n = std::min(text.size(), size_t(size) - 1);
        std::memcpy(buffer, text.data(), n);
        buffer[n] = '\0';
    }
    return int32_t(std::min(text.size(), size_t(INT32_MAX)));
}

// ---- threads -------------------------------------------------------------------------------------------------------

namespace {

struct BigStackCall {
    const std::function<void()> *work;
    std::exception_ptr failure;
    std::string errors;

    void run() noexcept {
        Scope scope;
        try {
            (*work)();
        } catch (...) {
            failure = std::current_exception();
        }
        errors = Scope::errors();
    }
};

#ifdef _WIN32
DWORD WINAPI big_stack_main(void *call) {
    static_cast<BigStackCall *>(call)->run();
    return 0;
}

bool run_on_thread(BigStackCall &call, size_t stack_bytes) {
    HANDLE thread =
        CreateThread(nullptr, stack_bytes, big_stack_main, &call, STACK_SIZE_PARAM_IS_A_RESERVATION, nullptr);
    if (thread == nullptr) return false;
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
    return true;
}
#else
void *big_stack_main(void *call) {
    static_cast<BigStackCall *>(call)->run();
    return nullptr;
}

bool run_on_thread(BigStackCall &call, size_t stack_bytes) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) return false;
    pthread_t thread;
    const bool started = pthread_attr_setstacksize(&attributes, stack_bytes) == 0 &&
                         pthread_create(&thread, &attributes, big_stack_main, &call) == 0;
    pthread_attr_destroy(&attributes);
    if (started) pthread_join(thread, nullptr);
    return started;
}
#endif

} // namespace

void on_big_stack(size_t n_bytes, const std::function<void()> &work) {
    BigStackCall call{&work, nullptr, {}};
    const size_t needed = std::max(LEAST_BIG_STACK_BYTES, n_bytes * STACK_BYTES_PER_INPUT_BYTE);
    // Where address space is limited, a smaller stack may be enough.
    size_t stack_bytes = std::max(BIG_STACK_BYTES, needed);
    while (!run_on_thread(call, stack_bytes)) {
        if (stack_bytes == needed) throw Failure(TRIO_E_NATIVE, "no memory for the stack of a thread");
        stack_bytes = std::max(needed, stack_bytes / 4);
    }
    scope_errors += call.errors;
    if (call.failure) std::rethrow_exception(call.failure);
}

double thread_seconds() {
#if !defined(_WIN32) && defined(CLOCK_THREAD_CPUTIME_ID)
    timespec now;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0) return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
#endif
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ---- log -----------------------------------------------------------------------------------------------------------

namespace {

// llama.cpp logs from any thread, sometimes from ggml's workers. Lines are kept here until trio_log_next() takes them.
class LogRing {
public:
    void set_level(int32_t level) {
        std::lock_guard<std::mutex> lock(mutex_);
        level_ = level;
    }

    void write(int32_t level, const char *text) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (level == GGML_LOG_LEVEL_CONT) {
            level = partial_.level;
        } else if (!partial_.text.empty()) {
            end_line();
        }
        partial_.level = level;
        for (const char *c = text; *c != '\0'; ++c) {
            if (*c == '\n') {
                end_line();
                partial_.level = level;
            } else if (partial_.text.size() < MAX_LINE_BYTES) {
                partial_.text += *c;
            }
        }
    }

    bool take(std::string &text, int32_t &level) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (lines_.empty()) return false;
        text = std::move(lines_.front().text);
        level = lines_.front().level;
        lines_.pop_front();
        return true;
    }

private:
    struct Line {
        int32_t level = GGML_LOG_LEVEL_INFO;
        std::string text;
    };
    static constexpr size_t MAX_LINES = 1024;
    static constexpr size_t MAX_LINE_BYTES = 4096;

    void end_line() {
        if (partial_.level >= level_ && !partial_.text.empty()) {
            if (lines_.size() == MAX_LINES) lines_.pop_front();
            lines_.push_back(std::move(partial_));
        }
        partial_ = Line();
    }

    std::mutex mutex_;
    int32_t level_ = GGML_LOG_LEVEL_WARN;
    Line partial_;
    std::deque<Line> lines_;
};

LogRing &log_ring() {
    static LogRing *ring = new LogRing; // never destroyed: threads may log until the process ends
    return *ring;
}

void on_log(ggml_log_level level, const char *text, void *) {
    try {
        if (level == GGML_LOG_LEVEL_ERROR && scope_depth > 0 && scope_errors.size() < MAX_ERROR_BYTES) {
            scope_errors += text;
        }
        if (level == GGML_LOG_LEVEL_WARN && warnings_expected > 0) level = GGML_LOG_LEVEL_INFO;
        log_ring().write(level, text);
    } catch (...) { // losing a line is better than an exception inside llama.cpp
    }
}

} // namespace
} // namespace trio

using namespace trio;

// ---- the C surface -------------------------------------------------------------------------------------------------

extern "C" {

int32_t trio_abi_version(void) {
    return TRIO_LLAMA_ABI;
}

int32_t trio_last_error(char *buffer, int32_t size) {
    return copy_text(last_error, buffer, size);
}

int32_t trio_init(const char *plugin_dir, int32_t log_level) {
    return guard([&] {
        check(log_level >= 1 && log_level <= 5, "log_level must be between 1 and 5");
        static std::mutex mutex;
        static bool done = false;
        std::lock_guard<std::mutex> lock(mutex);
        if (done) return TRIO_OK;
        // Without this, an abort starts a debugger to print a backtrace.
#ifdef _WIN32
        _putenv_s("GGML_NO_BACKTRACE", "1");
#else
        setenv("GGML_NO_BACKTRACE", "1", 1);
#endif
        log_ring().set_level(log_level);
        llama_log_set(on_log, nullptr);
        ggml_log_set(on_log, nullptr);
        mtmd_helper_log_set(on_log, nullptr); // mtmd has a logger of its own
        ggml_set_abort_callback(on_ggml_abort);
        ggml_backend_load_all_from_path(plugin_dir);
        llama_backend_init();
        if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr) {
            throw Failure(TRIO_E_LOAD,
                          std::string("no CPU backend found in ") + (plugin_dir ? plugin_dir : "(default)"));
        }
        done = true;
        return TRIO_OK;
    });
}

int32_t trio_log_next(char *buffer, int32_t size, int32_t *level) {
    return guard([&] {
        check_pointer(buffer, "buffer");
        check_pointer(level, "level");
        std::string text;
        if (!log_ring().take(text, *level)) return 0;
        return copy_text(text, buffer, size);
    });
}

int32_t trio_system_info(char *buffer, int32_t size) {
    return guard([&] { return copy_text(llama_print_system_info(), buffer, size); });
}

} // extern "C"
